"""What a command prints of a user's mistake."""

import re


def error_of(stderr: str) -> str:
    """Return what follows the line in which commands that train say that they start."""
    return re.sub(r"^mae-et \S+: \w+ in .*: starting\n", "", stderr)
