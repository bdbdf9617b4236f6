"""Measure features: kNN accuracy, a ridge classifier, effective rank."""
