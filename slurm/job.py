"""What runs in each process of a job: join the others, run a command, and hand over when told to.

submitit's way with signals alone does not do for training: its handler runs in rank 0 only, at any
moment, and not at all while the process waits in a collective. Here a signal raises the run's flag
(`mae_et/runtime/signals.py`); at the next step the processes agree, save once, and rank 0 calls
submitit's own handler, which queues the job again. What a job needs to go on lies in the run
folder, so it does not matter who queued it again: submitit, SLURM after a preemption, or
`slurm.retry`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from mae_et.errors import Interrupted
from mae_et.io.atomic import write_text_atomically
from slurm.journal import note, this_job
from slurm.progress import reached
from slurm.squeue import job_state
from slurm.watchdog import Watchdog

PORT_SECONDS = 300


@dataclass(frozen=True)
class Job:
    """A command of mae-et as submitit calls it, in every process of the job."""

    run: Callable[[list[str]], object]
    """Runs a command line; a function of a module, for it is pickled by its name."""
    words: list[str]
    """The command line, without `mae-et`."""
    folder: Path
    """The run's folder."""
    grace: float = 60.0
    """Seconds from a signal until a process that does not react is ended."""

    def __call__(self) -> None:
        """Run the command; return when it is done, or queued again."""
        rank = join(self.folder / "slurm")
        try:
            self._run(rank)
        finally:
            if rank == 0:
                port_file(self.folder / "slurm").unlink(missing_ok=True)

    def _run(self, rank: int) -> None:
        if rank == 0:
            saved, logged = reached(self.folder)
            lost = max(0, logged - saved)
            note(self.folder, "started", node=node(), step=saved, lost=lost)
        with Watchdog(self.grace, lambda number: self._give_up(number)):
            try:
                self.run(list(self.words))
            except Interrupted as stop:
                if rank == 0:
                    self._hand_over(stop)
                return
            except Exception as error:
                sentence = " ".join(str(error).split()) or type(error).__name__
                facts = {"rank": rank, "node": node(), "kind": type(error).__name__}
                note(self.folder, "failed", sentence=sentence[-1000:], **facts)
                raise
        if rank == 0:
            note(self.folder, "finished")

    def checkpoint(self) -> DelayedSubmission:
        """Return what submitit runs when the job starts again: the same, for it resumes by itself.

        submitit asks for it on its signal (SIGUSR2): after the run has saved, or while there is
        nothing to save yet.
        """
        return DelayedSubmission(self)

    def _hand_over(self, stop: Interrupted) -> None:
        """Have the job queued again, unless it is being taken away or was told to end."""
        if stop.signal == signal.SIGUSR2 or (stop.signal == signal.SIGTERM and still_wanted()):
            note(self.folder, "requeued", step=stop.step, signal=stop.signal)
            try:
                signal.raise_signal(signal.SIGUSR2)  # submitit's handler does not come back
            except UncompletedJobError as error:  # after as many time limits as are allowed
                sentence = " ".join(str(error).split())
                note(self.folder, "given up", sentence=sentence, step=stop.step)
                raise
            except (subprocess.SubprocessError, OSError) as error:
                # SLURM refuses where it has queued the job again itself, after a preemption.
                print(f"mae-et: not queued again by this process: {error}", file=sys.stderr)
        else:
            note(self.folder, "stopped", step=stop.step, signal=stop.signal)

    def _give_up(self, number: int) -> None:
        """Queue the job again from a process that hangs: from its last checkpoint on disk."""
        facts = {"node": node(), "kind": "Hang"}
        name = signal.Signals(number).name
        sentence = f"no step was finished in {self.grace:.0f} s after {name}: ended where it hung"
        note(self.folder, "failed", sentence=sentence, **facts)
        if still_wanted():
            requeue()


def still_wanted() -> bool:
    """Return whether this process is part of a SLURM job that runs: nobody has cancelled it."""
    job = this_job().get("job")
    return "SLURM_JOB_ID" in os.environ and job is not None and job_state(job) == "RUNNING"


def requeue() -> bool:
    """Queue this process's SLURM job again; return whether SLURM did."""
    command = ["scontrol", "requeue", this_job()["job"]]
    try:
        return subprocess.run(command, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def node() -> str:
    """Return the name of this machine, as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join(folder: Path) -> int:
    """Set the environment that torch.distributed reads, from submitit's; return the rank.

    Every GPU that SLURM shows stays visible: `mae_et.runtime.distributed` takes the one of the
    local rank, or the only one.

    Args:
        folder: shared by the machines; the main process leaves its port there.
    """
    place = submitit.JobEnvironment()
    if place.num_tasks == 1:  # a launch inside of another one must not inherit its ranks
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        return 0
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_PORT"] = str(agreed_port(folder, place.global_rank))
    return place.global_rank


def port_file(folder: Path) -> Path:
    """Return the file of the port of this job since its last start.

    A local job does not count its starts: there the main process removes the file at its end.
    """
    facts = this_job()
    return folder / f"port-{facts.get('job')}-{facts.get('restart', 0)}"


def agreed_port(folder: Path, rank: int) -> int:
    """Return the port of the main process: one that is free, told through the shared folder.

    submitit draws it from the job's id, and another job on the machine may have it.

    Raises:
        TimeoutError: the main process has left none.
    """
    path = port_file(folder)
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        write_text_atomically(path, str(port))
        return port
    for _ in range(PORT_SECONDS * 10):
        try:
            return int(path.read_text())
        except (FileNotFoundError, ValueError):
            time.sleep(0.1)
    raise TimeoutError(f"the main process left no port in {path} within {PORT_SECONDS} s")
