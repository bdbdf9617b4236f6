"""Read, recognise, write and export checkpoints: our own and other projects'."""
