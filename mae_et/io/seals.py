"""Checksums in the small files that decide labels, order or results.

A flipped bit in an index, a list of classes or a journal changes numbers without an error. So these
files contain the SHA-256 of their content: a JSON object or line as its entry `sha256`, any other
file as a last line `sha256:...`, which readers of `.npy` ignore.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.io.plain_files import read_mapping

KEY = "sha256"
_TAG = b"\nsha256:"
_UNSEALED = "it has no checksum, like files of early versions of mae-et"
TRAILER_BYTES = len(_TAG) + 64
"""Length of the checksum at the end of a file."""


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum, which does not depend on the order of keys."""
    return content | {KEY: _digest(content)}


def unseal(content: dict[str, Any]) -> dict[str, Any]:
    """Return a sealed object without its checksum.

    Raises:
        ValueError: the checksum is missing or does not match.
    """
    plain = {key: value for key, value in content.items() if key != KEY}
    if KEY not in content:
        raise ValueError(_UNSEALED)
    if content[KEY] != _digest(plain):
        raise ValueError("it does not match its checksum")
    return plain


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the sealed object in a JSON file, without its checksum; refuse a damaged file."""
    content = read_mapping(path)
    try:
        return unseal(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def sealed_bytes(content: bytes) -> bytes:
    """Return a file's content followed by its checksum."""
    return content + _TAG + hashlib.sha256(content).hexdigest().encode()


def check_sealed(path: Path) -> None:
    """Raise a ValueError unless a file matches the checksum at its end."""
    if not check_digest(path, _TAG):
        raise ValueError(_UNSEALED)


def check_digest(path: Path, tag: bytes) -> bool:
    """Return whether a file ends with a tag and a SHA-256; raise a ValueError if it is not its."""
    left = path.stat().st_size - len(tag) - 64
    with path.open("rb") as file:
        file.seek(max(0, left))
        written = file.read()
        if not written.startswith(tag):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    if written != tag + digest.hexdigest().encode():
        raise ValueError("it does not match its checksum")
    return True


def _digest(content: dict[str, Any]) -> str:
    read_back = json.loads(json.dumps(content))  # keys become strings, as in the file
    text = json.dumps(read_back, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
