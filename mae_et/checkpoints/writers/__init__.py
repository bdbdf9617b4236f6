"""Write checkpoints in the layouts of other libraries."""
