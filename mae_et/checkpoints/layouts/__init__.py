"""How other libraries name and describe their weights."""
