"""The log of a run's jobs: `slurm/events.jsonl` in its folder, one line per event.

Processes on several nodes append to it, each line in a single write.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from mae_et.io.atomic import MACHINE
from mae_et.io.plain_files import append_line, read_bytes

Event = dict[str, Any]
# The batch script writes this to rank 0's stderr log at each start.
START = "mae-et: the job starts"
Kind = Literal[
    "submitted", "started", "finished", "failed", "requeued", "stopped", "retried", "given up"
]


def events_file(folder: Path) -> Path:
    """Return the path of a run folder's event log."""
    return folder / "slurm" / "events.jsonl"


def record_event(folder: Path, event: Kind, **facts: Any) -> None:
    """Append an event with the time, the machine and, inside a job, its id and restarts."""
    line = {"time": time.time(), "event": event, "machine": MACHINE, **this_job(), **facts}
    path = events_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(line) + "\n")


def read_events(folder: Path) -> list[Event]:
    """Return a run's events, oldest first.

    Incomplete lines, and jobs of the run that this folder was copied from, are skipped.
    """
    try:
        content = read_bytes(events_file(folder))
    except OSError:
        return []
    events = []
    for line in content.decode(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and _is_whole(event) and not _is_of_another(folder, event):
            events.append(event)
    return events


def submitted(events: list[Event]) -> Event:
    """Return the last submission's event; empty if there is none."""
    return next((event for event in reversed(events) if event["event"] == "submitted"), {})


def _is_of_another(run: Path, event: Event) -> bool:
    """Return whether the job of an event writes its logs to another run's folder."""
    logs = event.get("logs")
    try:
        if not isinstance(logs, str) or not Path(logs).is_dir():  # moved, or mounted elsewhere
            return False
        return not any(each.is_dir() and each.samefile(logs) for each in _log_folders(run))
    except OSError:  # closed to this user, or not a path
        return False


def _is_whole(event: Event) -> bool:
    """Return whether an event has the fields and types that readers require."""
    job = event.get("job", "")
    return (
        isinstance(event.get("event"), str)
        and "time" in event
        and all(_is_count(event.get(key, 0)) for key in ("time", "lost", "restart"))
        and (job is None or isinstance(job, str))
    )


def _is_count(value: object) -> bool:
    return type(value) in {int, float} and 0 <= value < 1e15  # type: ignore[operator]


def log_file(run: Path, events: list[Event], job: str) -> Path | None:
    """Return the stderr log of a job's rank 0; None if no event names its folder.

    The folder comes from an untrusted file, so only log folders of this run's jobs are accepted:
    `slurm` in the run folder, or in the folder of the run or sweep that it belongs to.
    """
    logs = next((event["logs"] for event in reversed(events) if "logs" in event), None)
    if not isinstance(logs, str) or Path(logs) not in _log_folders(run):
        return None
    return Path(logs) / f"{job}_0_log.err" if re.fullmatch(r"\w+", job) else None


def _log_folders(run: Path) -> list[Path]:
    """Return the folders to which a run's jobs may write logs: its own, or its parent's."""
    whole = run.absolute()
    return [folder / "slurm" for folder in (whole, *list(whole.parents)[:2])]


def this_job() -> dict[str, Any]:
    """Return the id and restart count of the job that this process belongs to, if any."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        local = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
        return {"job": local} if local else {}
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
