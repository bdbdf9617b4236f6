"""Process-level runtime: ranks, device, precision, signals, watchdog, system errors."""
