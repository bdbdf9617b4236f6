"""Open files in folders that others can write to: follow no links, wait for no pipes."""

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically


def no_follow(path: str | Path, flags: int) -> int:
    """Open a file for writing, as the `opener` of `open`; it may belong to another user.

    Raises:
        UserError: the file is a link, which could lead to any file of this user.
        OSError: the file cannot be opened, or is a pipe without a reader.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link; delete it") from None
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a record in a single write, and flush it to disk."""
    with open(path, "ab", buffering=0, opener=no_follow) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def read_bytes(path: Path, most: float = math.inf) -> bytes:
    """Return a file's content, of at most `most` bytes.

    Raises:
        OSError: the file cannot be read, is larger, or is a pipe or a device, which might never
            end.
    """
    with open(path, "rb", opener=_no_wait) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
        return file.read()


def check_replaceable(path: Path, start: str, name: str) -> None:
    """Refuse to replace a file that the command did not write; it may not exist, or be empty.

    `start` is a pattern of the first 8 KiB of what the command writes, `name` the config's key.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except OSError as error:
        raise UserError(f"{name} {path} cannot be read: {error.strerror}") from None
    if head and not re.match(start.encode(), head, re.DOTALL):
        raise UserError(
            f"{name} {path} exists, and is not what this command writes: give another {name}, or "
            "delete it"
        )


def _no_wait(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path) -> str:
    """Return a file's text; refuse one that cannot be read or is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; refuse one that cannot be read or holds another type."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not an object")
    return content


def keep_settings(path: Path, settings: dict[str, Any], refusal: str) -> None:
    """Record a folder's settings in a JSON file; refuse settings that differ from recorded ones."""
    if path.exists():
        check_settings(read_mapping(path), settings, refusal)
    write_text_atomically(path, json.dumps(settings, indent=1))


def check_settings(before: dict[str, Any], now: dict[str, Any], refusal: str) -> None:
    """Refuse settings, as JSON types, that differ from recorded ones (see `keep_settings`).

    `refusal` starts the error message, which then names the first difference.
    """
    for key, value in json.loads(json.dumps(now)).items():
        if before.get(key) != value:
            unknown = "not recorded (by another version of mae-et)"
            earlier = repr(before[key]) if key in before else unknown
            raise UserError(
                f"{refusal}: {key} was {earlier} and is now {value!r}; give another output, or "
                "delete it"
            )
