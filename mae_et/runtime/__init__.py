"""This process: ranks, device, precision, signals, the watchdog, system errors."""
