"""Search a curriculum for a dataset and a model: `mae-et search`."""
