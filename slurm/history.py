"""Summarise a run's events: the number of restarts, and the last error."""

import re
from collections import Counter
from pathlib import Path

from slurm.events import Event, log_file

# srun's last messages, after that about a task's end.
EPILOGUE = re.compile("srun: (launch/slurm|Force Terminated)")
FAILURES = frozenset({"failed", "given up", "retried"})


def restarts(events: list[Event], job: str | None, known_starts: int) -> int:
    """Return how often a run's jobs were restarted.

    A start that is killed before its first event leaves none, but SLURM's restart count, which
    later events of the same job record, includes it. So does `known_starts` of the last `job`.
    """
    starts: Counter[object] = Counter()
    for event in events:
        if event["event"] == "started":
            starts[event.get("job")] += 1
    for event in events:
        started = event.get("job")
        if started in starts:
            starts[started] = max(starts[started], 1 + event.get("restart", 0))
    starts[job] = max(starts[job], known_starts)
    return max(0, starts.total() - 1)


def last_error(run: Path, events: list[Event], job: str | None, ended: bool) -> str:
    """Return a run's last error; empty if there is none.

    An error before the last start is marked: the run has continued since. If no event names an
    error, that of an ended job is the last line of its log.
    """
    failures = [place for place, event in enumerate(events) if event["event"] in FAILURES]
    if failures:
        sentence = str(events[failures[-1]].get("sentence", ""))
        started = any(event["event"] == "started" for event in events[failures[-1] :])
        return f"before its last restart: {sentence}" if started and sentence else sentence
    if events and events[-1]["event"] == "stopped":
        return ""  # by a signal, and saved: the log ends with srun's messages
    path = log_file(run, events, job) if job is not None and ended else None
    if path is None or not path.is_file():
        return ""
    lines = map(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((line for line in reversed([*lines]) if line and not EPILOGUE.match(line)), "")
