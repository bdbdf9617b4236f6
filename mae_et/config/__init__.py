"""What a run is: frozen dataclasses, read from YAML files and flags."""
