"""The payload of a job: join the other ranks, run a command, requeue when interrupted.

submitit's signal handling alone does not suit training: its handler runs on rank 0 only, at any
moment, and never while the main thread waits in a collective. Here a signal sets the run's flag
(`mae_et/runtime/signals.py`); all ranks agree during the next step and save once, and rank 0 calls
submitit's handler, which requeues the job. The run folder holds everything needed to resume, so a
job may be requeued by submitit, by SLURM after a preemption, or by `slurm.retry`.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.errors import Interrupted, RunFailed, Stopped, one_line
from mae_et.io.atomic import write_text_atomically
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime.console import say
from mae_et.runtime.signals import STOP_SIGNALS
from slurm.events import record_event, this_job
from slurm.private import PRIVATE, current_umask
from slurm.squeue import job_state, run_program
from slurm.stop_deadline import stop_deadline

PORT_SECONDS = 300
PAUSES = (2, 5, 10)  # in all shorter than SLURM's default KillWait of 30 s


@dataclass(frozen=True)
class Job:
    """A command of mae-et, called by submitit on every rank of the job."""

    run: Callable[[list[str]], object]
    """Runs a command line; a module-level function, since it is pickled by name."""
    words: list[str]
    """The command line, without `mae-et`."""
    folder: Path
    """Run folder."""
    grace: float = 60.0
    """Seconds after a signal until an unresponsive process is ended."""
    limit: float = math.inf
    """Seconds from the start of the job to the signal before its time limit."""
    start: Path = field(default_factory=Path.cwd)
    """Folder that relative paths refer to: the folder of the submission."""
    umask: int = field(default_factory=current_umask)
    """Umask of the run's files: that of the submission."""

    def __call__(self) -> None:
        """Run the command; return once it has finished or the job is requeued."""
        os.chdir(self.start)  # `cd` in `setup`, or a node without the folder, may change it
        os.umask(self.umask | PRIVATE)
        rank = set_rank_environment(self.folder / "slurm")
        os.umask(self.umask)
        try:
            self._run(rank)
        finally:
            os.umask(self.umask | PRIVATE)  # of submitit's result, a pickle
            if rank == 0:
                port_file(self.folder / "slurm").unlink(missing_ok=True)

    def _run(self, rank: int) -> None:
        if rank == 0:
            saved, logged = read_progress(self.folder)
            lost = max(0, logged - saved)
            record_event(self.folder, "started", node=node_name(), step=saved, lost=lost)
        sys.argv = ["mae-et", *self.words]  # submitit's say nothing in the run's records
        began = time.monotonic()
        with stop_deadline(self.grace, self._give_up):
            try:
                self.run(list(self.words))
            except (Interrupted, Stopped) as stop:
                if rank == 0:
                    self._refuse_repetition(stop, time.monotonic() - began)
                    self._hand_over(stop)
                return
            except Exception as error:
                sentence = one_line(error) or type(error).__name__
                facts = {"rank": rank, "node": node_name(), "kind": type(error).__name__}
                record_event(self.folder, "failed", sentence=sentence[-1000:], **facts)
                raise
        if rank == 0:
            record_event(self.folder, "finished")
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            for number in STOP_SIGNALS:  # as Python exits, their default would fail the job
                signal.signal(number, signal.SIG_IGN)

    def checkpoint(self) -> DelayedSubmission:
        """Return the payload of the restarted job: this one, because the command resumes by itself.

        submitit calls this in its SIGUSR2 handler, after the run has saved its state (if any).
        """
        return DelayedSubmission(self)

    def _refuse_repetition(self, stop: Interrupted | Stopped, seconds: float) -> None:
        """Count a time limit before anything was saved as a crash (`slurm.retry`)."""
        late = stop.signal == signal.SIGUSR2 and seconds > self.limit / 2  # otherwise preempted
        if stop.step is None and late:
            sentence = f"stopped after {seconds:.0f} s, before anything was saved: raise --time"
            record_event(self.folder, "failed", sentence=sentence, node=node_name())
            raise RunFailed(sentence)

    def _hand_over(self, stop: Interrupted | Stopped) -> None:
        """Requeue the job, unless it is being cancelled or the user stopped it."""
        unless_cancelled = stop.signal in (signal.SIGTERM, signal.SIGUSR1) and is_running()
        if stop.signal == signal.SIGUSR2 or unless_cancelled:
            record_event(self.folder, "requeued", step=stop.step, signal=stop.signal)
            os.umask(self.umask | PRIVATE)  # of the pickle that the handler writes
            try:
                signal.raise_signal(signal.SIGUSR2)  # submitit's handler does not return
            except UncompletedJobError as error:  # more time limits than `timeouts` allows
                record_event(self.folder, "given up", sentence=one_line(error), step=stop.step)
                raise
            except (subprocess.SubprocessError, OSError) as error:
                sentence = f"scontrol did not requeue the job: {one_line(error)}"
                if own_state() in {"RUNNING", None}:  # else SLURM has requeued it already
                    record_event(self.folder, "failed", sentence=sentence, node=node_name())
                    raise RunFailed(sentence) from error  # a success would start the follow-ups
                say(sentence)
        else:
            record_event(self.folder, "stopped", step=stop.step, signal=stop.signal)
            sys.exit(128 + stop.signal)  # a success would start the follow-ups

    def _give_up(self, number: int) -> None:
        """Requeue the job from a hung process; it resumes from the last checkpoint on disk."""
        facts = {"node": node_name(), "kind": "Hang"}
        name = signal.Signals(number).name
        sentence = f"no step finished within {self.grace:.0f} s after {name}: the process hung"
        record_event(self.folder, "failed", sentence=sentence, **facts)
        if is_running():
            requeue()


def read_progress(folder: Path) -> tuple[int, int]:
    """Return the step of a run's newest checkpoint, and the last step in its metrics.

    A resumed run repeats the steps between them.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    rows = read_metrics(folder)
    saved = checkpoint_step(checkpoints[-1]) if checkpoints else 0
    return saved, rows[-1]["step"] if rows else 0


def own_state() -> str | None:
    """Return the state of this process's SLURM job; None outside of one, or without an answer."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return _until_answered(lambda: job_state(this_job()["job"]))


def is_running() -> bool:
    """Return whether SLURM still lists this process's job as running, not as cancelled."""
    return own_state() == "RUNNING"


def requeue() -> bool:
    """Requeue this process's SLURM job; return whether SLURM accepted."""
    command = ("scontrol", "requeue", this_job()["job"])
    return _until_answered(lambda: run_program(*command)) is not None


def _until_answered(ask: Callable[[], str | None]) -> str | None:
    """Ask SLURM again while it does not answer: a controller may be busy or restarting."""
    for seconds in (*PAUSES, 0):
        answer = ask()
        if answer is not None:
            return answer
        time.sleep(seconds)
    return None


def node_name() -> str:
    """Return SLURM's name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def set_rank_environment(folder: Path) -> int:
    """Set the environment variables of torch.distributed from submitit's; return the rank.

    Rank 0 publishes its port in the folder, which all nodes share. All GPUs that SLURM exposes stay
    visible; `mae_et.runtime.distributed` selects the local rank's, or the only one.
    """
    place = submitit.JobEnvironment()
    if place.num_tasks == 1:  # a job launched from another job must not inherit its ranks
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        return 0
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_PORT"] = str(shared_port(folder, place.global_rank))
    return place.global_rank


def port_file(folder: Path) -> Path:
    """Return the file with the port of this job's current start.

    Local jobs do not count their starts; their rank 0 deletes the file at the end.
    """
    facts = this_job()
    return folder / f"port-{facts.get('job')}-{facts.get('restart', 0)}"


def shared_port(folder: Path, rank: int) -> int:
    """Return the port of rank 0, which picks a free one and publishes it in the shared folder.

    submitit derives a port from the job's id without checking that it is free, and every restart of
    the job would derive the same one.
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
    raise TimeoutError(f"rank 0 published no port in {path} within {PORT_SECONDS} s")
