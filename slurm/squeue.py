"""States of jobs from squeue, else sacct; unknown jobs are omitted."""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

TIMEOUT_SECONDS = 30
# In all other states a job may still run, or run again.
TERMINAL = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
})  # fmt: skip
QUEUE_FORMAT = "ArrayJobID:12|,ArrayTaskID:12|,State:24|,RestartCnt:12|,ReasonList:1000"


@dataclass(frozen=True)
class JobState:
    """State of a job."""

    state: str
    """SLURM's state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
    reason: str = ""
    """Why the job is pending, or the nodes that it runs on."""
    requeues: int = 0
    """Number of requeues, if squeue knows the job."""

    @property
    def starts(self) -> int:
        """Minimum number of times that the job was started."""
        return self.requeues + (self.state in {"RUNNING", "COMPLETING"})


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """Return the states of jobs by id; jobs that SLURM does not know are omitted.

    Accounting (sacct) comes last: it may be absent, and lags by seconds.
    """
    # Ids come from files and go to a command line.
    wanted = {job for job in jobs if re.fullmatch(r"\d+(_\d+)?", job, re.ASCII)}
    if not wanted:
        return {}
    known = _queue(wanted)
    return known | _accounting(wanted - set(known))


def job_state(job: str) -> str | None:
    """Return the controller's current state of a job; None if it is unknown."""
    found = _queue({job}).get(job)
    return found.state if found else None


def run_program(*command: str) -> str | None:
    """Return the output of a SLURM program; None if it is missing, fails or hangs."""
    # A user's SQUEUE_PARTITION, say, would hide jobs of other partitions.
    environment = {
        name: value for name, value in os.environ.items()
        if not name.startswith("SQUEUE_") or name == "SQUEUE_CLUSTERS"
    }  # fmt: skip
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _queue(jobs: set[str]) -> dict[str, JobState]:
    """Return the states of jobs, also of recently ended ones, that the controller knows."""
    output = run_program(
        "squeue", "--array", "--noheader", "--states=all", f"--Format={QUEUE_FORMAT}",
        f"--jobs={','.join(sorted(jobs))}",
    )  # fmt: skip
    states = {}
    for line in (output or "").splitlines():
        words = [word.strip() for word in line.split("|", 4)]
        if len(words) < 5:
            continue
        job, element, state, requeues, reason = words
        job = job if element == "N/A" else f"{job}_{element}"
        reason = reason.strip("()") if state == "PENDING" else reason
        states[job] = JobState(state, reason, int(requeues) if requeues.isdecimal() else 0)
    return {job: state for job, state in states.items() if job in jobs}


def _accounting(jobs: set[str]) -> dict[str, JobState]:
    if not jobs:
        return {}
    output = run_program(
        "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State",
        f"--jobs={','.join(sorted(jobs))}",
    )  # fmt: skip
    states = {}
    for line in (output or "").splitlines():
        job, _, state = line.partition("|")
        if job in jobs and state:
            states[job] = JobState(state.split()[0])  # "CANCELLED by 1000"
    return states
