"""Find the checkpoint to resume from, and refuse what would change a run's numbers."""
