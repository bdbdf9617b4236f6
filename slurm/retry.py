"""After a job's processes have ended: start it again if it crashed, a bounded number of times.

The batch script calls it with the exit status of srun, on the job's first machine:

    python -m slurm.retry RUNS STATUS RETRIES

RUNS is a file with the folders of the runs, one for each element of an array. The script ends with
the same status. When the job was taken away (cancelled, preempted, out of time) it is killed
before it comes to this, or SLURM says that the job runs no more.
"""

import json
import os
import re
import sys
from pathlib import Path

from mae_et.runtime import watchdog
from slurm.job import requeue, still_wanted
from slurm.journal import Event, log_file, note, read_events, this_job
from slurm.progress import reached

# Mistakes of the user, numbers that are lost, time limits that came too often (submitit's word):
# starting again would end the same, or is not wanted.
FINAL = frozenset({"UserError", "Diverged", "UncompletedJobError"})
# What a process that ends itself in the midst of a step cannot note.
ENDS = {
    watchdog.EXIT_STATUS: "no step was finished in efficiency.step_timeout; the log of each "
    "process says where it stood"
}


def main(folder: Path, status: int, retries: int) -> int:
    """Decide, and return the exit status of the script."""
    if status == 0 or not still_wanted():
        return status
    job = this_job()
    events = [event for event in read_events(folder) if event.get("job") == job["job"]]
    mine = [event for event in events if event.get("restart") == job["restart"]]
    if any(event["event"] in {"requeued", "finished"} for event in mine):
        return status
    failures = [event for event in mine if event["event"] == "failed"]
    # Those that lost a peer tell of its end, not of its reason.
    reasons = [event for event in failures if event["kind"] != "PeerLost"]
    sentence = reasons[0]["sentence"] if reasons else killed_task(folder, job["job"], events)
    sentence = sentence or ENDS.get(status) or f"srun ended with status {status}"
    if reasons and reasons[0]["kind"] in FINAL:
        note(folder, "given up", sentence=sentence)
        return status
    step, _ = reached(folder)
    crashes = 0
    for event in reversed([event for event in events if event["event"] == "retried"]):
        if event["step"] < step:
            break
        crashes += 1
    if crashes >= retries:
        note(folder, "given up", sentence=sentence, step=step, crashes=crashes + 1)
        return status
    note(folder, "retried", sentence=sentence, step=step)
    print(f"mae-et: crashed ({sentence}); queued again from step {step}", file=sys.stderr)
    requeue()
    return status


def killed_task(folder: Path, job: str, events: list[Event]) -> str:
    """Return what srun wrote last of a process that was killed; empty where it wrote nothing."""
    path = log_file(folder, events, job) or folder / "slurm" / f"{job}_0_log.err"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^srun: error: (\S+: task \S+: .*)$", text, re.MULTILINE)
    # The first that ended is the reason for the others, which srun terminates.
    own = [line for line in found if "Terminated" not in line and "Exited" not in line]
    return own[-1] if own else ""


def run_folder(runs: Path) -> Path:
    """Return the folder of the run that this job, or element of an array, is."""
    element = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    return Path(json.loads(runs.read_text(encoding="utf-8"))[int(element)])


if __name__ == "__main__":
    sys.exit(main(run_folder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])))
