"""The ancestor of all processes of a SLURM cluster, which kills them when it ends.

Runs by itself, without the packages of an environment (`python -I -S`): see `slurm_cluster`.
"""

import contextlib
import ctypes
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds within which a daemon must answer; generous, for machines under load.
PATIENCE = 30.0

# Constants of prctl, from linux/prctl.h.
SET_PARENT_DEATH_SIGNAL = 1
SET_CHILD_SUBREAPER = 36


class ClusterError(RuntimeError):
    """The cluster did not start, did not reach an awaited state, or rejected a command."""


def find(program: str) -> str | None:
    """Return a program's path; daemons are often outside a user's `PATH`."""
    places = (os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin")
    return shutil.which(program, path=os.pathsep.join(places))


def node_names(nodes: int) -> tuple[str, ...]:
    # Launchers connect to a node by its name, so the name must be an address.
    return tuple(f"127.0.0.{index}" for index in range(1, nodes + 1))


def ends_of_logs(folder: Path, lines: int = 15) -> str:
    """Return the last lines of each daemon's log, or of its output if it has none."""
    ends = []
    for printed in sorted(folder.glob("*.out")):
        log = printed.with_suffix(".log")
        path = log if log.exists() else printed
        text = path.read_text(errors="replace").splitlines()[-lines:]
        ends += [f"--- {path}", *text] if text else []
    return "\n".join(ends)


def parents() -> dict[int, int]:
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


@dataclass(frozen=True)
class Layout:
    """Size of a cluster, and folders of its state and logs."""

    scratch: Path
    folder: Path
    nodes: int
    cpus: int
    gpus: int


class Daemons:
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
                [find(program) or program, *arguments],
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
                    raise ClusterError(f"{what}\n{ends_of_logs(self.folder)}")
            if time.monotonic() > end:
                what = f"the cluster is not up within {PATIENCE:g} s"
                raise ClusterError(f"{what}\n{ends_of_logs(self.folder)}")
            time.sleep(0.01)

    def wait_for_answer(self, address: str | tuple[str, int]) -> None:
        def answers() -> bool:
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            with socket.socket(family) as client:
                return client.connect_ex(address) == 0

        self.wait_until(answers)


def supervise(parent: int, layout: Layout) -> int:
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
        children = [pid for pid, parent in parents().items() if parent == os.getpid()]
        if time.monotonic() > end:
            raise ClusterError(f"the cluster's processes {children} cannot be killed")
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _start_daemons(layout: Layout) -> None:
    scratch, names = layout.scratch, node_names(layout.nodes)
    scratch.chmod(0o711)  # munge insists that anyone could reach its socket.
    (scratch / "munge.key").write_bytes(secrets.token_bytes(128))
    controller, *ports = _free_ports(1 + layout.nodes)
    _write_configuration(layout, controller, ports)

    daemons = Daemons(layout.folder)
    daemons.start("munged", "--foreground", "--num-threads=10", f"--socket={scratch}/munge.socket",
                  *(f"--{name}-file={scratch}/munge.{name}" for name in ("key", "pid", "seed")),
                  )  # fmt: skip
    daemons.wait_for_answer(f"{scratch}/munge.socket")
    daemons.start("slurmctld", "-D", "-c")
    # A node that finds no controller sleeps for a second.
    daemons.wait_for_answer(("127.0.0.1", controller))
    for name in names:
        daemons.start("slurmd", "-D", "-c", "-N", name, log=f"slurmd-{name}")
    sinfo = [find("sinfo") or "", "--noheader", "--Node", "--partition=main", "--format=%N %T"]

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


def _write_configuration(layout: Layout, controller: int, ports: Sequence[int]) -> None:
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
    for name, port in zip(node_names(layout.nodes), ports, strict=True):
        lines.append(f"NodeName={name} Port={port} {node}")
    (scratch / "state").mkdir()
    (scratch / "slurm.conf").write_text("\n".join(line.strip() for line in lines) + "\n")
    (scratch / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


if __name__ == "__main__":
    parent, scratch, folder, *size = sys.argv[1:]
    sys.exit(supervise(int(parent), Layout(Path(scratch), Path(folder), *map(int, size))))
