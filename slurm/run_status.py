"""Determine the status of runs from SLURM if it answers, otherwise only from their folders."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

from mae_et.errors import UserError, listed
from mae_et.io.atomic import MACHINE, process_exists
from mae_et.io.lock import writer_has_ended
from mae_et.io.metrics_file import METRICS, Row, is_plausible
from mae_et.io.score_records import RESULTS
from mae_et.monitoring.figures import seconds_left
from mae_et.monitoring.run_record import RunRecord
from mae_et.runtime.console import notify
from slurm.events import Event, events_file, read_events, submitted
from slurm.history import last_error, restarts
from slurm.squeue import TERMINAL, JobState, job_states

Read = TypeVar("Read")
# A run without a job counts as stopped after this long without a row of metrics.
SILENCE_SECONDS = 120.0
SILENCE_ROWS = 10
MAX_WORDS = 160  # characters of a state with its error, in a table
SHOWN_SCORES = ("top1", "knn", "linear", "ridge", "effective_rank", "val_images")
ENDED = frozenset({"finished", "damaged", "stopped", *map(str.lower, TERMINAL)})
# State according to the last event, if SLURM does not know the job.
STATE_AFTER_EVENT = {
    "finished": "finished", "given up": "failed", "failed": "failed", "stopped": "stopped",
    "requeued": "requeued", "retried": "requeued",
}  # fmt: skip


@dataclass(frozen=True)
class RunStatus:
    """Status of a run."""

    run: str
    job: str | None
    """Id of the last job."""
    state: str
    """pending, running, finished, failed, ...: SLURM's, in lower case, if it knows the job;
    unknown if it is a process of another machine."""
    reason: str
    """Why the job is pending, the nodes that it runs on, or the machine that knows its state."""
    step: int
    steps: int | None
    stage: str
    """Such as 3/10; empty before the first row of metrics."""
    bandwidth: int | None
    loss: float | None
    images_per_second: float | None
    eta: float | None
    """Seconds."""
    restarts: int
    """Number of restarts, including jobs that were killed before they wrote anything."""
    lost: int
    """Steps that restarts repeated, as far as the metrics show."""
    scores: dict[str, float]
    """Accuracies: of a job that scores, its own; of a run, its last ones, and if it is finished
    those of its encoder on all images (`knn RUN`) instead of a probe's; the effective rank if there
    are no labels."""
    error: str
    """Last error, marked if the run has restarted since; empty for finished runs."""


def status(folders: Sequence[Path]) -> list[RunStatus]:
    """Return the status of runs, and of the runs in their folders (follow-ups and sweeps).

    Raises:
        UserError: a folder does not exist, or none contains a run.
    """
    found = {folder: find_runs(folder) for folder in folders}
    others = [folder for folder in folders if not found[folder]]
    if len(others) == len(folders):
        raise UserError(f"{others[0]} contains no run")
    if others:
        notify(f"not shown, as they hold no run: {listed(others)}")
    return _statuses([run for below in found.values() for run in below])


def unfinished(folders: Sequence[Path]) -> dict[Path, str]:
    """Return for each run without results its state, step and last error.

    For example `failed (step 40): reason`.

    A finished run has the first such state of its follow-ups: `knn failed: reason`. Folders of
    sweeps are no runs.
    """
    runs = {
        run: folder
        for folder in folders
        for run in find_runs(folder)
        if is_run(folder) and submitted(read_events(folder)).get("kind") != "compare"
    }
    pending = [run for run in runs if not (run / RESULTS).exists()]
    found: dict[Path, str] = {}
    for run, each in zip(pending, _statuses(pending), strict=True):
        if each.state != "finished":
            words = each.state if run == runs[run] else f"{run.name} {each.state}"
            words += f" (step {each.step:,})" if each.step else ""
            words += f": {each.error}" if each.error else ""
            found.setdefault(runs[run], shorten(words, MAX_WORDS, placeholder=" ..."))
    return found


def _statuses(runs: Sequence[Path]) -> list[RunStatus]:
    events = {run: read_events(run) for run in runs}
    jobs = {run: submitted(events[run]).get("job") for run in runs}
    known = job_states(job for job in jobs.values() if job)
    return [_status(run, events[run], jobs[run], known) for run in runs]


def _status(
    run: Path, events: list[Event], job: str | None, known: dict[str, JobState]
) -> RunStatus:
    record = RunRecord(run)
    row = _readable(lambda: record.last_row) or {}
    plan = _readable(lambda: record.plan)
    starts = [event for event in events if event["event"] == "started"]
    said = known.get(job) if job else None
    state = _state(record, events, said, row)
    running = state in {"running", "completing"}
    return RunStatus(
        run=str(run),
        job=job,
        state=state,
        reason=_reason(events, said, state),
        step=row.get("step", 0),
        steps=plan.steps if plan else None,
        stage=f"{row['stage'] + 1}/{len(plan.stages)}" if row and plan else "",
        bandwidth=row.get("bandwidth"),
        loss=row.get("loss"),
        images_per_second=row.get("images_per_second"),
        eta=seconds_left(row) if row and running else None,
        restarts=restarts(events, job, said.starts if said else 0),
        lost=sum(event.get("lost", 0) for event in starts),
        scores=_scores(record),
        error=_error(run, events, job, state),
    )


def _readable(read: Callable[[], Read]) -> Read | None:
    """Return what a run records; None if its file is damaged or cannot be read."""
    try:
        return read()
    except (OSError, UserError):
        return None


def _scores(record: RunRecord) -> dict[str, float]:
    """Return the values of the last row of scores, or of the results if there are any."""
    rows = _readable(lambda: record.scores)
    given: Row = dict(rows[-1]) if rows else {}
    if record.has_results:
        given |= _readable(lambda: record.figures) or {}
    return {key: given[key] for key in SHOWN_SCORES if is_plausible(given.get(key))}


def _state(record: RunRecord, events: list[Event], said: JobState | None, row: Row) -> str:
    run, last = record.folder, events[-1] if events else None
    if record.has_results and not _is_scored_again(run, last):
        return "damaged" if _readable(lambda: record.results) is None else "finished"
    if last and last["event"] == "finished":  # without results, a training that stopped early
        return "stopped" if (run / "plan.json").exists() else "finished"
    if said is not None and said.state != "COMPLETED":
        stopped = said.state == "FAILED" and last is not None and last["event"] == "stopped"
        return "stopped" if stopped else said.state.lower()
    if last and last["event"] in STATE_AFTER_EVENT:
        return STATE_AFTER_EVENT[last["event"]]
    sent = submitted(events)
    if sent.get("executor") == "local":
        if sent.get("machine", MACHINE) != MACHINE:
            return "unknown"
        process = sent.get("job") or ""
        if process.isdecimal() and process_exists(process):
            return "running"
        return "not started" if last is sent else "stopped"
    ended = writer_has_ended(run, since=last["time"] if last else 0.0)
    if ended:
        return "stopped"
    if last is sent or not (last or row):
        return "not started" if ended is None else "running"
    # The run may be on another machine: judge by the age of its last event and row.
    seen = max(entry["time"] for entry in (last, row) if entry)
    pace = row.get("window_seconds", 0.0) * SILENCE_ROWS
    return "stopped" if time.time() - seen > max(SILENCE_SECONDS, pace) else "running"


def _is_scored_again(run: Path, last: Event | None) -> bool:
    """Return whether a job was submitted to a folder of scores that already has some."""
    if last is None or (run / "plan.json").exists():
        return False
    return last["time"] > (run / RESULTS).stat().st_mtime


def _reason(events: list[Event], said: JobState | None, state: str) -> str:
    if state == "unknown":
        machine = str(submitted(events)["machine"]).partition(" ")[0]
        return f"a process of {machine}: ask there"
    return said.reason if said and state in {"pending", "running"} else ""


def _error(run: Path, events: list[Event], job: str | None, state: str) -> str:
    if state == "finished":
        return ""
    if state == "damaged":
        return "results.json cannot be read; the command of the run writes it again"
    return last_error(run, events, job, state in ENDED)


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """Return the run folders among a folder, its subfolders, and those of runs and sweeps in it.

    Runs of a search are in its `trials`.
    """
    if not folder.exists():
        raise UserError(f"there is no run folder {folder}")
    found = [folder] if is_run(folder) else []
    for path in sorted(path for path in folder.glob("*") if depth and path.is_dir()):
        if is_run(path) or (path / "slurm").is_dir() or path.name == "trials":
            found += find_runs(path, depth - 1)
    return found


def is_run(folder: Path) -> bool:
    """Return whether a run or a job has written to a folder."""
    return events_file(folder).exists() or (folder / METRICS).exists()
