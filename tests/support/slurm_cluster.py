"""A real SLURM cluster on the loopback, started in a fraction of a second.

Nodes, CPUs and GPUs are simulated, whatever the machine has, so that jobs over several nodes run
anywhere. All daemons are children of one supervisor, which also adopts orphans: no daemon and no
job outlives the cluster, even if the tests are killed. The state is discarded; the logs stay in the
cluster's folder.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import slurm_supervisor
from slurm_supervisor import PATIENCE, ClusterError, ends_of_logs, find, node_names, parents

T = TypeVar("T")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol", "scancel")

# Factor on the timeouts of jobs, which are for two free cores.
BUSY = 3


def missing_programs() -> list[str]:
    """Return the names of the required programs that are not installed."""
    return [name for name in PROGRAMS if find(name) is None]


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Args:
        folder: folder of the daemons' logs.
        environment: environment that points SLURM's programs to this cluster.
        nodes: names of the nodes, which are addresses: the first is a job's `MASTER_ADDR`.
        supervisor: ancestor of all processes of the cluster.
    """

    folder: Path
    environment: dict[str, str]
    nodes: tuple[str, ...]
    supervisor: subprocess.Popen[str]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command and return its output.

        Args:
            command: name and arguments.
            check: raise an error if it fails.

        Raises:
            ClusterError: it failed; the message contains its errors.
        """
        program = find(command[0]) or command[0]
        done = subprocess.run(
            [program, *command[1:]],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip()
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}: {said}")
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """Submit a job with `sbatch` and return its id."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def show(self, job_id: int | str) -> dict[str, str]:
        """Return the fields of `scontrol show job`.

        SLURM forgets a job five minutes after its end.
        """
        return dict(
            re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job_id)))
        )

    def state(self, job_id: int | str) -> str:
        """Return a job's state: `PENDING`, `RUNNING`, `COMPLETED`, ..."""
        return self.show(job_id)["JobState"]

    def restart_count(self, job_id: int | str) -> int:
        """Return the number of times that a job was requeued."""
        return int(self.show(job_id)["Restarts"])

    def wait_for(self, predicate: Callable[[], T], what: str, seconds: float = 60) -> T:
        """Poll a predicate until it returns a true value, and return that.

        Args:
            predicate: function to poll.
            what: description of the awaited event, for the error.
            seconds: timeout on two free cores; `BUSY` times as long is allowed.

        Raises:
            ClusterError: timeout; the message contains the queue and the ends of the logs.
        """
        seconds *= BUSY
        end = time.monotonic() + seconds
        while not (answer := predicate()):
            if time.monotonic() > end:
                queue = self.run("squeue", "--all", check=False)
                logs = ends_of_logs(self.folder)
                raise ClusterError(f"{what}: not within {seconds:g} s\n{queue}{logs}")
            time.sleep(0.05)
        return answer

    def wait_for_state(self, job_id: int | str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of the given states, and return its state."""

        def reached() -> str | None:
            state = self.state(job_id)
            return state if state in states else None

        return self.wait_for(reached, f"job {job_id} is {' or '.join(states)}", seconds) or ""

    def restart_soon(self, job_id: int | str, restart: int = 1) -> None:
        """Wait until a job is requeued, and skip most of SLURM's delay."""
        self.wait_for(lambda: self.restart_count(job_id) >= restart, "the job to be requeued", 90)
        self.wait_for_state(job_id, "PENDING", "RUNNING")
        # Not at once: SLURM revoked the job's credential in this very second.
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2seconds", check=False)

    def processes(self) -> list[int]:
        """Return the ids of all processes of the cluster: supervisor, daemons, tasks of jobs."""
        running = parents()
        found = [pid for pid in running if pid == self.supervisor.pid]
        for pid in found:
            found += [child for child, parent in running.items() if parent == pid]
        return found

    def processes_on(self, node: str) -> list[int]:
        """Return the processes of one node: slurmd, steps, and their tasks."""
        found = set()
        for process in self.processes():
            place = Path(f"/proc/{process}")
            words = (place / "cmdline").read_bytes().decode().split("\0")
            if words[0].endswith("slurmd") and node in words:
                found.add(process)
            if f"SLURMD_NODENAME={node}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.add(process)
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found.add(parent)
        return sorted(found)

    def stop(self) -> None:
        """Kill all processes of the cluster, including jobs; may be called again.

        Raises:
            ClusterError: a process could not be killed.
        """
        if self.supervisor.poll() is not None:
            return
        self.supervisor.terminate()
        try:
            said, _ = self.supervisor.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            raise ClusterError("the cluster's supervisor does not end") from None
        if self.supervisor.returncode > 0:
            raise ClusterError(said.strip())


@contextlib.contextmanager
def start_cluster(
    folder: Path, *, nodes: int = 2, cpus: int = 2, gpus: int = 0
) -> Iterator[Cluster]:
    """Start a cluster, yield it once its nodes are idle, and stop it at the end of the block.

    All partitions have all nodes and no time limit: `main`, the default, is never preempted; `high`
    requeues jobs of `low` and `low_nograce` if it needs their CPUs. These first receive the signal
    that they requested with `--signal`, then SIGTERM (15 s later in `low`, at once in
    `low_nograce`), and SIGKILL 5 s after that.

    Args:
        folder: folder of the logs, created if necessary.
        nodes: number of simulated nodes.
        cpus: simulated CPUs per node.
        gpus: simulated GPUs per node; `CUDA_VISIBLE_DEVICES` names them.

    Raises:
        ClusterError: a program is missing, or a daemon did not start; the message contains the end
            of its log.
    """
    missing = missing_programs()
    if missing:
        raise ClusterError(f"SLURM's programs are not installed ({', '.join(missing)})")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="slurm-", dir=_fast_folder()))
    environment = _environment(scratch)
    supervisor = None
    try:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", slurm_supervisor.__file__, str(os.getpid()), scratch,
             folder, *map(str, (nodes, cpus, gpus))],
            env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert supervisor.stdout is not None
        said = supervisor.stdout.readline()
        if said != "ready\n":
            raise ClusterError((said + supervisor.communicate()[0]).strip())
        yield Cluster(folder, environment, node_names(nodes), supervisor)
    finally:
        if supervisor is not None:
            Cluster(folder, environment, node_names(nodes), supervisor).stop()
        shutil.rmtree(scratch, ignore_errors=True)


def _environment(scratch: Path) -> dict[str, str]:
    """Return this process's environment without other clusters, pointed to a new one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_"))
    }
    return kept | {"SLURM_CONF": str(scratch / "slurm.conf")}


def _fast_folder() -> str | None:
    """Return an executable folder in memory, or None for the system's temporary folder.

    Both have short paths, as sockets require.
    """
    memory = "/dev/shm"
    try:
        found = os.statvfs(memory)
    except OSError:
        return None
    # Containers often mount it small, or noexec, which would prevent jobs' scripts from running.
    fit = not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize > 2**29
    return memory if fit and os.access(memory, os.W_OK) else None
