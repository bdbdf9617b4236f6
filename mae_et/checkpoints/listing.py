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


def run_of(path: Path) -> Path:
    """Return the run folder of a checkpoint; any other path is returned as it is."""
    return path.parents[1] if _NAME.fullmatch(path.name) and len(path.parents) > 1 else path


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's file name."""
    return int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
