"""One training loop for every kind of run: session, loop, step, metrics, resume."""
