"""Checksums stored inside the files they cover, so that file and checksum cannot be separated.

A zip archive's own CRC-32 covers its entries, but not the directory that locates them. A SHA-256 of
the whole archive therefore follows it (in older files as its comment), which zip readers skip;
`head -c -71 FILE | sha256sum` recomputes it. safetensors has no checksum: there the SHA-256 is an
entry of the metadata, computed with zeros in its place. Those of small records are apart, in
`mae_et/io/seals.py`, as commands that read records load no PyTorch.
"""

import hashlib
import json
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mae_et.io.seals import check_digest
from mae_et.runtime.watchdog import heartbeat

_TAG = b"sha256:"
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


class SealedArchive:
    """An archive written front to back, with its SHA-256 computed on the way, and appended.

    Nothing is buffered in Python: a process forked meanwhile (a loader worker) has nothing to
    write.
    """

    error: OSError | None = None
    """Why a write failed, such as a full disk, which `torch.save` replaces by a RuntimeError about
    file offsets, for paths too."""

    def __init__(self, file: RawIOBase):
        self.file = file
        self._digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write bytes, and return how many: all of them."""
        heartbeat()  # a slow disk is not a hang, as long as it writes one tensor after the other
        left = memoryview(content).cast("B")
        length = len(left)
        self._digest.update(left)
        try:
            while left:  # the system may write a part, as of more than 2 GiB
                left = left[self.file.write(left) :]
        except OSError as error:
            self.error = error
            raise
        return length

    def flush(self) -> None:
        """Do nothing: `torch.save` requires the method."""

    def seal(self) -> None:
        """Append the SHA-256 of the archive."""
        self.write(_TAG + self._digest.hexdigest().encode("ascii"))


def check_archive(path: Path) -> bool:
    """Compare an archive with the checksum at its end; False if it has none."""
    try:
        return check_digest(path, _TAG)
    except ValueError as error:
        raise Damaged(f"{path} is damaged: {error}") from None


def is_cut_short(path: Path) -> bool:
    """Return whether a file is empty, or a truncated archive or safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if _BEGIN.startswith(file.read(len(_BEGIN))):
            file.seek(max(0, size - _END_LENGTH))
            end = file.read()
            return not (len(end) == _END_LENGTH and end.startswith(_END) and end.endswith(b"\0\0"))
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


def check_safetensors(path: Path) -> None:
    """Compare a safetensors file with the checksum in its metadata, if it has one."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(min(length, path.stat().st_size))
        try:
            described = json.loads(header).get("__metadata__", {})
        except (ValueError, AttributeError):
            return  # not a safetensors file: reading it raises the error
        if DIGEST_KEY not in described:
            return
        written = str(described[DIGEST_KEY])
        digest = hashlib.sha256(start)
        digest.update(header.replace(written.encode(), _ZEROS.encode(), 1))
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != written:
        raise Damaged(f"{path} is damaged: it does not match its checksum")
