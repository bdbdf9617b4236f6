"""Run configurations: frozen dataclasses, read from YAML files and flags."""
