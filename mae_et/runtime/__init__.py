"""This process: ranks and device, precision, signals, the watchdog, errors of the system."""
