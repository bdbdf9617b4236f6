"""Where, and with what, a job runs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mae_et.errors import UserError


@dataclass(frozen=True)
class ClusterConfig:
    """Where a job runs: what is asked of SLURM, and how often it may start again."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: processes of this machine, in the background; debug: this process, with a
    debugger at the first error."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 0
    """GPUs of each machine (--gpus-per-node)."""
    tasks_per_node: int | None = None
    """Training processes on each machine; by default one for each GPU, or one without GPUs."""
    cpus_per_task: int | None = None
    """Cores of each process: its own and those of its loader processes."""
    memory_gb: float | None = None
    """Memory of each machine, in GB; the partition's default when not given."""
    time: str = "1-00:00:00"
    """Time limit as SLURM writes it: minutes, hours:minutes:seconds or days-hours:minutes:seconds.
    A run that reaches it is queued again and goes on."""
    partition: str | None = None
    """Partition, or several with commas between them."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the machines must have."""
    exclude: str | None = None
    """Machines that are left out."""
    name: str | None = None
    """Name of the job; the run folder's by default."""
    array_parallelism: int = 16
    """Jobs of a sweep that run at once."""
    mail_user: str | None = None
    """Address that SLURM writes to."""
    mail_type: str = "END,FAIL"
    """What SLURM writes about."""
    signal_delay: int = 120
    """Seconds before the time limit at which the run is told to save and to be queued again."""
    timeouts: int = 100
    """Time limits after which a job is still queued again."""
    retries: int = 3
    """Crashes in a row, with no new checkpoint between them, after which it is still started."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the job (module load ..., export NCCL_...)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further parameters of sbatch, without dashes ({reservation: icml, gres: 'gpu:a100:8'})."""
    srun: list[str] = field(default_factory=list)
    """Further arguments of srun."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "memory_gb", "array_parallelism"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"cluster: {name} must be positive, got {value}")
        for name in ("gpus_per_node", "timeouts", "retries", "signal_delay"):
            if getattr(self, name) < 0:
                raise UserError(f"cluster: {name} must not be negative, got {getattr(self, name)}")
        if self.executor == "local" and self.nodes > 1:
            raise UserError("cluster: executor local is one machine, so nodes must be 1")
        if self.executor == "debug" and self.tasks > 1:
            raise UserError("cluster: executor debug is one process, so tasks_per_node must be 1")
        self._check_words()
        if self.minutes < 1:
            raise UserError(f"cluster: time must be at least a minute, got {self.time}")

    def _check_words(self) -> None:
        """Refuse what would end a line of the batch script, and so begin a command.

        Quotes keep a shell from reading a word; of a comment, such as `#SBATCH --job-name='...'`,
        nothing but its line keeps it.

        Raises:
            UserError: a control character, or a parameter that is no name of one.
        """
        words = {name: value for name, value in self.__dict__.items() if isinstance(value, str)}
        words |= {f"extra.{name}": str(value) for name, value in self.extra.items()}
        words |= {f"srun[{place}]": word for place, word in enumerate(self.srun)}
        for name, value in words.items():
            if not value.isprintable():
                raise UserError(f"cluster: {name} has a control character in it: {value!r}")
        for name in self.extra:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
                raise UserError(f"cluster: extra has {name!r}, which is no parameter of sbatch")

    @property
    def tasks(self) -> int:
        """Training processes on each machine."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """Training processes in all."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """The time limit, in whole minutes.

        Raises:
            UserError: it is not written as SLURM writes it.
        """
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

    def single(self) -> "ClusterConfig":
        """Return the place of one process: its share of what each machine is asked for."""
        memory = self.memory_gb and max(1.0, self.memory_gb / self.tasks)
        return ClusterConfig(
            **self.__dict__
            | {
                "nodes": 1,
                "tasks_per_node": 1,
                "gpus_per_node": min(1, self.gpus_per_node),
                "memory_gb": memory,
            }
        )


def job_name(config: ClusterConfig, folder: Path) -> str:
    """Return the name that a job of a run folder bears."""
    return config.name or f"mae-et-{folder.resolve().name}"
