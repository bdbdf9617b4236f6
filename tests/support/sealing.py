"""Give an archive that a test made the checksum that a run's checkpoints have."""

from pathlib import Path

from mae_et.checkpoints.checksums import SealedArchive


def seal_archive(path: Path) -> None:
    """Write an archive again, with its SHA-256."""
    content = path.read_bytes()
    with path.open("rb+", buffering=0) as file:
        archive = SealedArchive(file)
        archive.write(content)
        archive.seal()
