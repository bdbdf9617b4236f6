"""Where images come from: folders, tar and prepared shards, Hugging Face, a generator."""
