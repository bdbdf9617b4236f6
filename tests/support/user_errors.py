"""What a command prints of a user's mistake."""

import re


def error_of(stderr: str) -> str:
    """Return what follows the lines in which commands that train say what they start with."""
    block = r"^(mae-et \S+: \w+ in .*|(data|model|plan|cost|device|passes|curves)  .*)\n"
    return re.sub(block, "", stderr, flags=re.MULTILINE)
