"""Which bandwidth when, the low-frequency crop, and what it costs."""
