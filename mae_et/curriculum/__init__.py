"""The bandwidth schedule, the low-frequency crop, and the cost of both."""
