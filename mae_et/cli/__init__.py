"""The `mae-et` command line: its subcommands and their arguments."""
