"""Write features or predictions to a file, and draw features."""
