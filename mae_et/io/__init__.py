"""Files on disk: atomic writes, locks, and safe reading of untrusted files."""
