"""Features of frozen encoders, kNN and linear probes."""
