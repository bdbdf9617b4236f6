"""Read text and JSON files of untrusted folders, or refuse them in one sentence."""

import json
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it cannot be read, or contains another type.
    """
    try:
        content = json.loads(read_text(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not an object")
    return content


def keep_settings(path: Path, settings: dict[str, Any], sentence: str) -> None:
    """Record in a JSON file the settings that a folder was made with; refuse to change them later.

    Args:
        path: the file.
        settings: values by name.
        sentence: error message, with `{key}`, `{before}` and `{now}` of the first that differs.

    Raises:
        UserError: a setting differs, or the file is damaged.
    """
    now = json.loads(json.dumps(settings))
    if path.exists():
        check_settings(read_mapping(path), now, sentence)
    write_text_atomically(path, json.dumps(now, indent=1))


def check_settings(before: dict[str, Any], now: dict[str, Any], sentence: str) -> None:
    """Compare settings, as JSON has them, with those that something was made with.

    Args:
        before: recorded settings, and whatever else is recorded.
        now: requested settings.
        sentence: see `keep_settings`.

    Raises:
        UserError: a setting differs.
    """
    for key, value in json.loads(json.dumps(now)).items():
        if before.get(key) != value:
            raise UserError(
                sentence.replace("{key}", key)
                .replace("{before}", repr(before.get(key)))
                .replace("{now}", repr(value))
            )
