"""Metrics, TensorBoard, reconstructions, comparisons and the offline report."""
