"""Files on disk: written atomically, locked by one writer, read without trusting them."""
