"""A real SLURM cluster on the loopback, started in a fraction of a second.

Nodes, CPUs and GPUs are simulated, whatever the machine has, so that jobs over several nodes run
anywhere. All daemons are children of one supervisor, which also adopts orphans: no daemon and no
job outlives the cluster, even if the tests are killed. The state is discarded; the logs stay in the
cluster's folder.

`python tests/support/slurm_cluster.py` starts a cluster by hand and waits for Ctrl-C
(`--accounting` adds a database, and with it `sacct`).
"""

import argparse
import contextlib
import ctypes
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol", "scancel")
ACCOUNTING = ("slurmdbd", "sacct", "mariadbd", "mariadb-install-db")

# Seconds within which a daemon must answer; generous, for machines under load.
PATIENCE = 30.0
# Factor on the timeouts of jobs, which are for two free cores.
BUSY = 3

# Constants of prctl, from linux/prctl.h.
SET_PARENT_DEATH_SIGNAL = 1
SET_CHILD_SUBREAPER = 36


class ClusterError(RuntimeError):
    """The cluster did not start, did not reach an awaited state, or rejected a command."""


def missing_programs(accounting: bool = False) -> list[str]:
    """Return the names of the required programs that are not installed."""
    names = PROGRAMS + ACCOUNTING if accounting else PROGRAMS
    return [name for name in names if _find(name) is None]


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
        program = _find(command[0]) or command[0]
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

    def start_now(self, job_id: int | str) -> None:
        """Start a requeued, pending job at once instead of after six seconds."""
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def wait_for(self, predicate: Callable[[], T], what: str, seconds: float = 30) -> T:
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
                logs = _ends_of_logs(self.folder)
                raise ClusterError(f"{what}: not within {seconds:g} s\n{queue}{logs}")
            time.sleep(0.05)
        return answer

    def wait_for_state(self, job_id: int | str, *states: str, seconds: float = 30) -> str:
        """Wait until a job is in one of the given states, and return its state."""

        def reached() -> str | None:
            state = self.state(job_id)
            return state if state in states else None

        return self.wait_for(reached, f"job {job_id} is {' or '.join(states)}", seconds) or ""

    def processes(self) -> list[int]:
        """Return the ids of all processes of the cluster: supervisor, daemons, tasks of jobs."""
        parents = _parents()
        found = [pid for pid in parents if pid == self.supervisor.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

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
    folder: Path, *, nodes: int = 2, cpus: int = 2, gpus: int = 0, accounting: bool = False
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
        accounting: keep accounts in a database for `sacct`; takes a second longer to start.

    Raises:
        ClusterError: a program is missing, or a daemon did not start; the message contains the end
            of its log.
    """
    missing = missing_programs(accounting)
    if missing:
        raise ClusterError(f"SLURM's programs are not installed ({', '.join(missing)})")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="slurm-", dir=_fast_folder()))
    environment = _environment(scratch)
    supervisor = None
    try:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, "--supervise", str(os.getpid()), str(scratch),
             f"--folder={folder}", f"--nodes={nodes}", f"--cpus={cpus}", f"--gpus={gpus}",
             *["--accounting"] * accounting],
            env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert supervisor.stdout is not None
        said = supervisor.stdout.readline()
        if said != "ready\n":
            raise ClusterError((said + supervisor.communicate()[0]).strip())
        yield Cluster(folder, environment, _node_names(nodes), supervisor)
    finally:
        if supervisor is not None:
            Cluster(folder, environment, _node_names(nodes), supervisor).stop()
        shutil.rmtree(scratch, ignore_errors=True)


def _find(program: str) -> str | None:
    """Return a program's path; daemons are often outside a user's `PATH`."""
    places = (os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin")
    return shutil.which(program, path=os.pathsep.join(places))


def _environment(scratch: Path) -> dict[str, str]:
    """Return this process's environment without other clusters, pointed to a new one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_"))
    }
    return kept | {"SLURM_CONF": str(scratch / "slurm.conf")}


def _node_names(nodes: int) -> tuple[str, ...]:
    # Launchers connect to a node by its name, so the name must be an address.
    return tuple(f"127.0.0.{index}" for index in range(1, nodes + 1))


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


def _ends_of_logs(folder: Path, lines: int = 15) -> str:
    """Return the last lines of each daemon's log, or of its output if it has none."""
    ends = []
    for printed in sorted(folder.glob("*.out")):
        log = printed.with_suffix(".log")
        path = log if log.exists() else printed
        text = path.read_text(errors="replace").splitlines()[-lines:]
        ends += [f"--- {path}", *text] if text else []
    return "\n".join(ends)


def _parents() -> dict[int, int]:
    """Return the parent of each running process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The program's name, in brackets before these, may contain any character.
                state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    parents[int(entry.name)] = int(parent)
    return parents


# The rest of the file runs in the supervisor.


@dataclass(frozen=True)
class _Layout:
    """Size of a cluster, and folders of its state and logs."""

    scratch: Path
    folder: Path
    nodes: int
    cpus: int
    gpus: int
    accounting: bool


class _Daemons:
    """Running daemons; waiting for them fails once one of them dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, program: str, *arguments: str, log: str = "") -> None:
        """Start a daemon in the foreground; it dies with the supervisor."""
        libc = ctypes.CDLL(None)
        path = self.folder / f"{log or program}.out"
        path.with_suffix(".log").unlink(missing_ok=True)
        with path.open("wb") as out:
            daemon = subprocess.Popen(
                [_find(program) or program, *arguments],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0),
            )
        self.started.append(daemon)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            for daemon in self.started:
                if daemon.poll() is not None:
                    what = f"{daemon.args!r} ended with {daemon.returncode}"
                    raise ClusterError(f"{what}\n{_ends_of_logs(self.folder)}")
            if time.monotonic() > end:
                what = f"the cluster is not up within {PATIENCE:g} s"
                raise ClusterError(f"{what}\n{_ends_of_logs(self.folder)}")
            time.sleep(0.01)

    def wait_for_answer(self, address: str | tuple[str, int]) -> None:
        def answers() -> bool:
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            with socket.socket(family) as client:
                return client.connect_ex(address) == 0

        self.wait_until(answers)


def _supervise(parent: int, layout: _Layout) -> int:
    """Start the daemons, and kill all of them on SIGTERM or when the parent dies."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    os.umask(0o077)
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        _start_daemons(layout)
        print("ready", flush=True)
        while os.getppid() == parent:
            _reap_children()
            time.sleep(0.2)
    except (ClusterError, OSError) as error:
        print(error, flush=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_children()
        shutil.rmtree(layout.scratch, ignore_errors=True)
    return 0


def _reap_children() -> bool:
    """Reap ended children; return whether any is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _kill_children() -> None:
    """Kill children until none is left: grandchildren become children of the supervisor.

    The order does not matter, as no state is kept.
    """
    end = time.monotonic() + PATIENCE / 2
    while _reap_children():
        children = [pid for pid, parent in _parents().items() if parent == os.getpid()]
        if time.monotonic() > end:
            raise ClusterError(f"the cluster's processes {children} cannot be killed")
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _start_daemons(layout: _Layout) -> None:
    scratch, names = layout.scratch, _node_names(layout.nodes)
    scratch.chmod(0o711)  # munge insists that anyone could reach its socket.
    (scratch / "munge.key").write_bytes(secrets.token_bytes(128))
    controller, database, accounts, *ports = _free_ports(3 + layout.nodes)
    _write_configuration(layout, controller, ports)

    daemons = _Daemons(layout.folder)
    daemons.start("munged", "--foreground", "--num-threads=10", f"--socket={scratch}/munge.socket",
                  *(f"--{name}-file={scratch}/munge.{name}" for name in ("key", "pid", "seed")),
                  )  # fmt: skip
    daemons.wait_for_answer(f"{scratch}/munge.socket")
    if layout.accounting:
        _start_accounting(daemons, layout, database, accounts)
    daemons.start("slurmctld", "-D", "-c")
    # A node that finds no controller sleeps for a second.
    daemons.wait_for_answer(("127.0.0.1", controller))
    for name in names:
        daemons.start("slurmd", "-D", "-c", "-N", name, log=f"slurmd-{name}")
    sinfo = [_find("sinfo") or "", "--noheader", "--Node", "--partition=main", "--format=%N %T"]

    def idle() -> bool:
        said = subprocess.run(sinfo, capture_output=True, text=True).stdout
        return said.splitlines() == [f"{name} idle" for name in names]

    daemons.wait_until(idle)


def _free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, below those that the kernel hands out by itself."""
    free: list[int] = []
    for port in random.sample(range(12000, 32000), 1000):
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("", port))
            except OSError:
                continue
        free.append(port)
        if len(free) == count:
            return free
    raise ClusterError(f"no {count} free ports")


def _host_and_user() -> tuple[str, str]:
    """Return the names by which SLURM is to know this machine and the user who runs it."""
    try:
        return socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise ClusterError(f"SLURM needs a user with a name, and {os.getuid()} has none") from None


def _write_configuration(layout: _Layout, controller: int, ports: Sequence[int]) -> None:
    scratch, folder = layout.scratch, layout.folder
    host, user = _host_and_user()
    lines = f"""
        ClusterName=loopback
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={controller}
        SlurmUser={user}
        SlurmdUser={user}
        CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
        MailProg=/bin/true

        StateSaveLocation={scratch}/state
        SlurmctldPidFile={scratch}/slurmctld.pid
        SlurmctldLogFile={folder}/slurmctld.log
        SlurmdSpoolDir={scratch}/%n
        SlurmdPidFile={scratch}/slurmd-%n.pid
        SlurmdLogFile={folder}/slurmd-%n.log

        # A requeued job waits until its former run's credential has expired.
        AuthType=auth/munge
        AuthInfo=socket={scratch}/munge.socket,cred_expire=5

        # Several nodes on one machine, with whatever CPUs they claim, and no need for root.
        SlurmdParameters=config_overrides
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        MpiDefault=none
        ReturnToService=2
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core

        SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
        EnforcePartLimits=ALL
        KillWait=5
        JobRequeue=1
        PreemptType=preempt/partition_prio
        PreemptMode=REQUEUE
        SlurmctldParameters=preempt_send_user_signal

        PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE
        PartitionName=main Default=YES PriorityTier=1 PreemptMode=OFF
        PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
        PartitionName=low_nograce PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
        PartitionName=high PriorityTier=10 PreemptMode=OFF
        """.splitlines()
    # Memory is pretended as the CPUs are, and is not held against anyone.
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={layout.cpus} RealMemory=1000000"
    if layout.gpus:
        lines.append("GresTypes=gpu")
        node += f" Gres=gpu:{layout.gpus}"
        for index in range(layout.gpus):
            (scratch / f"gpu{index}").symlink_to("/dev/null")  # Any device will do.
        gpus = f"Name=gpu File={scratch}/gpu[0-{layout.gpus - 1}]\n"
        (scratch / "gres.conf").write_text(gpus)
    for name, port in zip(_node_names(layout.nodes), ports, strict=True):
        lines.append(f"NodeName={name} Port={port} {node}")
    (scratch / "state").mkdir()
    (scratch / "slurm.conf").write_text("\n".join(line.strip() for line in lines) + "\n")
    (scratch / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _start_accounting(daemons: _Daemons, layout: _Layout, database: int, accounts: int) -> None:
    """Start a database and slurmdbd, which keeps SLURM's accounts in it."""
    scratch = layout.scratch
    host, user = _host_and_user()
    password = secrets.token_hex(16)
    install = subprocess.run(
        [_find("mariadb-install-db") or "", "--no-defaults", f"--datadir={scratch}/mariadb",
         f"--user={user}", "--skip-test-db", "--auth-root-authentication-method=normal"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if install.returncode:
        raise ClusterError(f"no database could be made\n{install.stdout}{install.stderr}")
    (scratch / "first.sql").write_text(
        f"CREATE DATABASE slurm;\nCREATE USER slurm@localhost IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON slurm.* TO slurm@localhost;\n"
    )
    daemons.start("mariadbd", "--no-defaults", f"--datadir={scratch}/mariadb", f"--user={user}",
                  f"--socket={scratch}/mariadb.socket", f"--pid-file={scratch}/mariadb.pid",
                  "--bind-address=127.0.0.1", f"--port={database}",
                  f"--init-file={scratch}/first.sql", "--innodb-lock-wait-timeout=900",
                  )  # fmt: skip
    daemons.wait_for_answer(("127.0.0.1", database))
    (scratch / "slurmdbd.conf").write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={scratch}/munge.socket\n"
        f"DbdHost={host}\nDbdAddr=127.0.0.1\nDbdPort={accounts}\nSlurmUser={user}\n"
        f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={database}\n"
        f"StorageUser=slurm\nStoragePass={password}\nStorageLoc=slurm\n"
        f"PidFile={scratch}/slurmdbd.pid\nLogFile={layout.folder}/slurmdbd.log\n"
    )
    with (scratch / "slurm.conf").open("a") as file:
        file.write(
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={accounts}\n"
            f"AccountingStoragePass={scratch}/munge.socket\n"
        )
    daemons.start("slurmdbd", "-D")
    daemons.wait_for_answer(("127.0.0.1", accounts))


def _main() -> int:
    parser = argparse.ArgumentParser(description="Start a SLURM cluster on the loopback.")
    parser.add_argument("--folder", type=Path, help="where logs go (a new temporary folder)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="of each node")
    parser.add_argument("--gpus", type=int, default=0, help="pretended ones of each node")
    parser.add_argument("--accounting", action="store_true", help="keep accounts for sacct")
    parser.add_argument("--supervise", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = {name: getattr(options, name) for name in ("nodes", "cpus", "gpus", "accounting")}
    if options.supervise:
        parent, scratch = options.supervise
        return _supervise(int(parent), _Layout(Path(scratch), options.folder, **size))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell's & started us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    folder = options.folder or Path(tempfile.mkdtemp(prefix="slurm-logs-"))
    try:
        with start_cluster(folder, **size) as cluster, contextlib.suppress(KeyboardInterrupt):
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
            print(f"# logs in {folder}; Ctrl-C ends the cluster and every job on it", flush=True)
            signal.pause()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
