"""How good features are: kNN, a ridge classifier, effective rank."""
