"""Score trained classifiers."""
