"""Config of a cluster: the resources of a job and how often it restarts."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mae_et.errors import UserError, require, require_in

OWN_OPTIONS = frozenset({
    "array", "dependency", "error", "no_requeue", "nodes", "ntasks", "ntasks_per_node", "open_mode",
    "output", "parsable", "quiet", "requeue", "signal", "test_only", "time", "wait", "wrap",
})  # fmt: skip
"""sbatch options that other keys set, or on which submission, restarts, logs and status depend."""


@dataclass(frozen=True)
class ClusterConfig:
    """Resources that a job requests from SLURM, and how often it may restart."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: background processes on this machine; debug: this process, with a debugger at
    the first error."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int | str = 0
    """GPUs per node (--gpus-per-node): their number, or with their type, such as a100:4."""
    tasks_per_node: int | None = None
    """Ranks per node; default: one per GPU, or one on nodes without GPUs."""
    cpus_per_task: int | None = None
    """CPU cores per rank, shared with its data-loading workers."""
    memory_gb: float | None = None
    """Memory per node in GB; default: the partition's."""
    time: str = "1-00:00:00"
    """Time limit in SLURM's notation: minutes, hours:minutes:seconds or days-hours:minutes:seconds.
    A run that reaches it is requeued and resumes."""
    partition: str | None = None
    """Partition, or a comma-separated list."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Required node features."""
    exclude: str | None = None
    """Nodes to exclude."""
    name: str | None = None
    """Job name; default: mae-et- and the name of the run folder."""
    dependency: str | None = None
    """Jobs to wait for, in sbatch's notation, such as afterok:1234."""
    array_parallelism: int = 16
    """Maximum number of concurrent jobs in a sweep."""
    mail_user: str | None = None
    """Address for SLURM's mail."""
    mail_type: str = "END,FAIL"
    """Events that SLURM mails about."""
    signal_delay: int = 120
    """Seconds before the time limit at which SLURM signals the run to save and requeue."""
    timeouts: int = 100
    """Maximum number of time limits after which a job is requeued."""
    retries: int = 3
    """Maximum number of restarts after crashes without a new checkpoint between them."""
    network_interface: str | None = None
    """Network interface over which ranks of several nodes connect, such as ib0 (`ip -br link`
    lists them): exported as NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME. By default NCCL chooses one,
    and gloo takes that of the node's host name."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before the job (module load ..., export NCCL_...)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional sbatch options, without dashes ({reservation: icml, gres: 'gpu:a100:8'})."""
    srun: list[str] = field(default_factory=list)
    """Additional srun arguments."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "nodes", "tasks_per_node", "cpus_per_task", "memory_gb")
        require_in("(0, inf)", self, "array_parallelism")
        require_in("[0, inf)", self, "timeouts", "retries", "signal_delay")
        require(self.gpus >= 0, f"gpus_per_node must not be negative, got {self.gpus_per_node}")
        if self.executor == "local" and self.nodes > 1:
            raise UserError("cluster: executor local runs on one machine, so nodes must be 1")
        if self.executor == "debug" and self.tasks > 1:
            raise UserError("cluster: executor debug runs one rank, so tasks_per_node must be 1")
        self._check_words()
        if self.minutes < 1:
            raise UserError(f"cluster: time must be at least a minute, got {self.time}")
        if self.signal_delay >= 60 * self.minutes:
            raise UserError(
                f"cluster: signal_delay {self.signal_delay} s leaves nothing of time {self.time} "
                f"({self.minutes} min)"
            )

    def _check_words(self) -> None:
        """Refuse characters that would end a line of the batch script and so start a command.

        Quotes protect a shell word, but a comment such as `#SBATCH --job-name='...'` ends with its
        line.
        """
        words = {name: value for name, value in self.__dict__.items() if isinstance(value, str)}
        words |= {f"extra.{name}": str(value) for name, value in self.extra.items()}
        words |= {f"srun[{place}]": word for place, word in enumerate(self.srun)}
        for name, value in words.items():
            if not value.isprintable():
                raise UserError(f"cluster: {name} contains a control character: {value!r}")
        for name in self.extra:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
                raise UserError(f"cluster: extra has {name!r}, which is not an sbatch option")
            if name.replace("-", "_") in OWN_OPTIONS:
                raise UserError(f"cluster: extra has {name!r}, which mae-et sets itself")

    @property
    def gpus(self) -> int:
        """Number of GPUs per node, without their type."""
        found = re.fullmatch(r"(?:[\w.-]+:)?(-?\d+)", str(self.gpus_per_node), re.ASCII)
        if found is None:
            raise UserError(
                "cluster: gpus_per_node must be a number, or a type and a number such as a100:4, "
                f"got {self.gpus_per_node}"
            )
        return int(found[1])

    @property
    def requests_gpus(self) -> bool:
        """Whether any option asks for GPUs; those of a partition or of `local` are not known."""
        options = [*self.extra.items(), *(("srun", word) for word in self.srun)]
        return self.gpus > 0 or any("gpu" in f"{name}={value}" for name, value in options)

    @property
    def tasks(self) -> int:
        """Ranks per node."""
        return self.tasks_per_node or max(1, self.gpus)

    @property
    def ranks(self) -> int:
        """Total number of ranks."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """Time limit in whole minutes, rounded up."""
        text = self.time.strip()
        found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
        if not found:
            raise UserError(f"cluster: time must read like 1-12:00:00 or 90, got {self.time!r}")
        days, *parts = found.groups()
        given = [int(part) for part in parts if part is not None]
        # After days, hours come first; otherwise one number is minutes, two are minutes:seconds.
        if days is None and len(given) < 3:
            given = [0, *given]
        hours, minutes, seconds = given + [0] * (3 - len(given))
        total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        return -(-total // 60)

    def one_task(self) -> "ClusterConfig":
        """Return the config of a job with one task, which sees all GPUs and cores of a node."""
        cores = self.cpus_per_task and self.cpus_per_task * self.tasks
        return replace(self, nodes=1, tasks_per_node=1, cpus_per_task=cores)

    def single(self) -> "ClusterConfig":
        """Return the config of a job with one rank, with its share of a node."""
        kind, typed, _ = str(self.gpus_per_node).rpartition(":")
        gpus = min(1, self.gpus)
        return replace(
            self,
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=f"{kind}:{gpus}" if typed else gpus,
            memory_gb=self.memory_gb and max(1.0, self.memory_gb / self.tasks),
        )


def job_name(config: ClusterConfig, folder: Path) -> str:
    """Return the name of a job that trains in a run folder."""
    return config.name or f"mae-et-{folder.resolve().name}"
