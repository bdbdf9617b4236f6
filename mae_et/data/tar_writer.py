"""Write WebDataset shards, whole or not at all."""

import io
import tarfile
from pathlib import Path
from typing import Any

from mae_et.io.atomic import write_atomically


class TarWriter:
    """Write a shard, and put it in place when it is complete."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "TarWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        self.temporary.unlink(missing_ok=True)  # of a killed process, or a link to any file
        self.tar = tarfile.open(self.temporary, "x", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, name: str, content: bytes) -> int:
        """Add a file and return the offset of its content."""
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        self.tar.addfile(entry, io.BytesIO(content))
        return self.tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def __exit__(self, kind: Any, *_: object) -> None:
        self.tar.close()
        if kind is None:
            write_atomically(self.path, self.temporary.replace)
        self.temporary.unlink(missing_ok=True)
