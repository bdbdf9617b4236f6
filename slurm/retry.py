"""Restart a crashed job, a bounded number of times.

The batch script calls this on the job's first node with the exit status of srun:

    python -m slurm.retry RUNS STATUS RETRIES

RUNS is a file with the run folders, one per array element. The script exits with the same status. A
job that was cancelled, preempted or timed out is not restarted: it is killed before this runs, or
SLURM no longer lists it as running.
"""

import json
import os
import re
import sys
from pathlib import Path

from mae_et.runtime import watchdog
from mae_et.runtime.console import say
from slurm.events import START, Event, log_file, read_events, record_event, this_job
from slurm.job import is_running, read_progress, requeue

# A user's mistake, a diverged run, too many time limits (UncompletedJobError): a restart would fail
# again, or is unwanted.
FINAL = frozenset({"UserError", "Diverged", "UncompletedJobError"})
ENDS = frozenset({"requeued", "stopped", "finished", "failed"})
# A process that ends itself within a step cannot record why.
HUNG = "no step or batch finished within step_timeout; the log of each rank has its stack"


def main(folder: Path, status: int, retries: int) -> None:
    """Restart the job if its run crashed; `status` is that of the script."""
    if status == 0 or not is_running():
        return
    job = this_job()
    events = [event for event in read_events(folder) if event.get("job") == job["job"]]
    mine = [event for event in events if event.get("restart") == job["restart"]]
    ends = [event["event"] for event in mine if event["event"] in ENDS]
    if ends and ends[-1] != "failed":
        return
    failures = [event for event in mine if event["event"] == "failed"]
    # A rank that lost a peer does not know the cause.
    reasons = [event for event in failures if event.get("kind") != "PeerLost"]
    sentence = reasons[0].get("sentence") if reasons else cause(folder, job["job"], events, status)
    sentence = sentence or f"srun exited with status {status}"
    if reasons and reasons[0].get("kind") in FINAL:
        record_event(folder, "given up", sentence=sentence)
        return
    step, _ = read_progress(folder)
    crashes = 0
    for event in reversed([event for event in events if event["event"] == "retried"]):
        if event.get("step", step) < step:
            break
        crashes += 1
    if crashes >= retries:
        record_event(folder, "given up", sentence=sentence, step=step, crashes=crashes + 1)
        return
    record_event(folder, "retried", sentence=sentence, step=step)
    say(f"crashed ({sentence}); requeued from step {step}")
    if not requeue() and is_running():
        record_event(folder, "given up", sentence=f"{sentence}, and SLURM refuses a restart")


def cause(folder: Path, job: str, events: list[Event], status: int) -> str:
    """Return why a job that recorded no error ended, from srun's messages about its tasks, if any.

    A task that ends by itself comes before those that srun then terminates and kills, whatever the
    order of the messages: srun reports tasks of several nodes as they arrive.
    """
    path = log_file(folder, events, job) or folder / "slurm" / f"{job}_0_log.err"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = text.rpartition(START)[2]  # restarts append to the log
    found = re.findall(r"^srun: error: (\S+: tasks? \S+: .*)$", text, re.MULTILINE)
    hung = f"Exited with exit code {watchdog.EXIT_STATUS}"
    if status == watchdog.EXIT_STATUS or any(line.endswith(hung) for line in found):
        return HUNG
    killed = (line for line in found if "Terminated" not in line and "Exited" not in line)
    # Before a run starts, an import or srun itself may fail.
    early = re.findall(
        r"^((?:[\w.]+(?:Error|Exception): |srun: (?:error|fatal|unrec)(?!.*: tasks? ))[^\n]*)$",
        text,
        re.MULTILINE,
    )
    return next(killed, early[-1] if early else "")


def run_folder(runs: Path) -> Path:
    """Return the run folder of this job or array element."""
    element = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    return Path(json.loads(runs.read_text(encoding="utf-8"))[int(element)])


if __name__ == "__main__":
    runs, status, retries = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if runs.exists():
        main(run_folder(runs), status, retries)
    else:
        say(f"{runs} was moved or deleted, so the job is not restarted")
    sys.exit(status)
