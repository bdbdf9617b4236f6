"""Benchmarks of speed and quality: `mae-et bench`, and scripts.

Imports among them are relative: an installed wheel has this folder as `mae_et.benchmarks`.
"""
