"""Checkpoints of ours and of others: read, recognised, written, exported."""
