"""Find the folders of runs and of jobs, and what was submitted to them."""

from pathlib import Path

from mae_et.errors import UserError
from mae_et.io.metrics_file import METRICS
from slurm.events import Event, events_file


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """Return the run folders among a folder, its subfolders, and those of runs and sweeps in it."""
    if not folder.exists():
        raise UserError(f"there is no run folder {folder}")
    found = [folder] if is_run(folder) else []
    for path in sorted(path for path in folder.glob("*") if depth and path.is_dir()):
        found += find_runs(path, depth - 1) if is_run(path) or (path / "slurm").is_dir() else []
    return found


def is_run(folder: Path) -> bool:
    """Return whether a run or a job has written to a folder."""
    return events_file(folder).exists() or (folder / METRICS).exists()


def submitted(events: list[Event]) -> Event:
    """Return the last submission's event; empty if there is none."""
    return next((event for event in reversed(events) if event["event"] == "submitted"), {})
