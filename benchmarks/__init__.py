"""Benchmarks of speed and quality: `mae-et bench`, and scripts."""
