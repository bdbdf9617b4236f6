"""The `mae-et` command: its commands, and what their arguments mean."""
