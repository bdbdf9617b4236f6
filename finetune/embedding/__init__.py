"""Write features to a file, and draw them."""
