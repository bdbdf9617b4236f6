"""Names of the checkpoints in a folder; reads none of them."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})\.pt")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=checkpoint_step)  # a step may have more than eight digits


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's file name."""
    return int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
