"""Text and JSON of a run's or a model's folder, which may be anybody's: read, or refused."""

import json
from pathlib import Path
from typing import Any

from mae_et.errors import UserError


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a description")
    return content
