"""Checksums stored inside the files they cover, so that file and checksum cannot be separated.

A zip archive's own CRC-32 covers its entries, but not the directory that locates them. A SHA-256 of
the whole file is therefore written as the archive's comment, which zip readers skip;
`head -c -71 FILE | sha256sum` recomputes it. safetensors has no checksum: there the SHA-256 is an
entry of the metadata, computed with zeros in its place.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mae_et.io.seals import check_digest

_TAG = b"sha256:"
_COMMENT = len(_TAG) + 64
_BEGIN = b"PK\x03\x04"
# The last record of a zip archive: its signature, and its length without the comment after it.
_END, _END_LENGTH = b"PK\x05\x06", 22

DIGEST_KEY = "mae_et.sha256"
_ZEROS = "0" * 64


class Damaged(ValueError):
    """A file that does not match its checksum."""


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors' names, types, shapes and values, in the mapping's order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal_archive(path: Path) -> None:
    """Write the SHA-256 of an archive into its comment, which `torch.save` leaves empty.

    Raises:
        ValueError: the file is not an archive, or has a comment.
    """
    with path.open("rb+") as file:
        if not _ends_without_comment(file):
            raise ValueError(f"{path} is not an archive without a comment")
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _COMMENT))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_TAG + digest.encode("ascii"))


def check_archive(path: Path) -> bool:
    """Compare an archive with the checksum in its comment.

    Returns:
        Whether the archive has a checksum; only mae-et writes one.

    Raises:
        Damaged: the checksum does not match.
    """
    try:
        return check_digest(path, _TAG)
    except ValueError as error:
        raise Damaged(f"{path} is damaged: {error}") from None


def is_cut_short(path: Path) -> bool:
    """Return whether a file is empty, or a truncated archive or safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if _BEGIN.startswith(file.read(len(_BEGIN))):
            return not _ends_without_comment(file)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            return False
        if length > size - 8:
            return True
        header = b"{" + file.read(length - 1)
    try:
        entries = json.loads(header).items()
        ends = [each["data_offsets"][1] for name, each in entries if name != "__metadata__"]
        return max(ends, default=0) > size - 8 - length
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # a damaged header: the length it describes is unknown


def _ends_without_comment(file: BinaryIO) -> bool:
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _END_LENGTH))
    end = file.read()
    return len(end) == _END_LENGTH and end.startswith(_END) and end.endswith(b"\0\0")


def sealed_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return tensors as a safetensors file with its own SHA-256 in the metadata.

    Equal tensors and metadata give equal bytes: metadata are sorted by name.
    """
    plain = safetensors_bytes(tensors)
    length = int.from_bytes(plain[:8], "little")
    entries = json.loads(plain[8 : 8 + length])
    described = dict(sorted((metadata | {DIGEST_KEY: _ZEROS}).items()))
    header = json.dumps({"__metadata__": described} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    content = len(header).to_bytes(8, "little") + header + plain[8 + length :]
    digest = hashlib.sha256(content).hexdigest()
    sealed = header.replace(_ZEROS.encode(), digest.encode(), 1)
    return content[:8] + sealed + content[8 + len(header) :]


def check_safetensors(path: Path) -> bool:
    """Compare a safetensors file with the checksum in its metadata.

    Returns:
        Whether the file has a checksum; only mae-et writes one.

    Raises:
        Damaged: the checksum does not match.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(min(length, path.stat().st_size))
        try:
            described = json.loads(header).get("__metadata__", {})
        except (ValueError, AttributeError):
            return False  # not a safetensors file: reading it raises the error
        if DIGEST_KEY not in described:
            return False
        written = str(described[DIGEST_KEY])
        digest = hashlib.sha256(start)
        digest.update(header.replace(written.encode(), _ZEROS.encode(), 1))
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != written:
        raise Damaged(f"{path} is damaged: it does not match its checksum")
    return True
