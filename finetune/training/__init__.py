"""Train classifiers: full fine-tuning, a linear probe, or from scratch."""
