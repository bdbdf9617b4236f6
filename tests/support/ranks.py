"""Run a command of mae-et on one rank or several."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tiny_run import TINY

from mae_et.cli.main import main
from mae_et.training import build as building
from mae_et.training.efficiency.compile import compile_network


@dataclass(frozen=True)
class Ranks:
    """Processes that run a command, whose output is in files."""

    command: list[str]
    folder: Path
    processes: list[BaseProcess]

    def read(self, stream: str) -> str:
        """Return what the ranks printed to `out` or `err`, in their order."""
        paths = (_log(self.folder, rank, stream) for rank in range(len(self.processes)))
        return "".join(path.read_text() for path in paths if path.exists())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until a rank has printed a text to standard error."""
        end = time.monotonic() + seconds
        while text not in self.read("err"):
            assert time.monotonic() < end, self.read("err")
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to every rank and to all of its processes."""
        for process in self.processes:
            os.killpg(process.pid, number)

    def finish(self, seconds: float = 120) -> subprocess.CompletedProcess:
        """Wait for all; return the first exit status other than zero, and what they printed."""
        for process in self.processes:
            process.join(seconds)
            process.kill()  # if it is still there
            process.join()
        failed = [process.exitcode for process in self.processes if process.exitcode]
        return subprocess.CompletedProcess(
            self.command, failed[0] if failed else 0, self.read("out"), self.read("err")
        )


def start(
    folder: Path, ranks: int, *flags: str, command: str = "pretrain", yaml: str = TINY,
    of_last: Sequence[str] = (), method: str = "fork", target: Callable[..., None] | None = None,
) -> Ranks:  # fmt: skip
    """Start a command on ranks that join over gloo, in the folder's subfolder named after them.

    The last rank has the flags `of_last` too. Forked, ranks need not import PyTorch for seconds;
    `spawn` is for tests of a GPU, which does not survive a fork. `target` replaces `run_rank`, and
    ends by calling it.
    """
    config = folder / "tiny.yaml"
    config.write_text(yaml)
    words = [command, f"--config={config}", f"--output.dir={folder / str(ranks)}", *flags]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment = address | {"WORLD_SIZE": str(ranks)}
    for log in folder.glob("rank-*"):  # of ranks before these
        log.unlink()
    context: Any = multiprocessing.get_context(method)
    processes: list[BaseProcess] = [
        context.Process(
            target=target or run_rank, args=(rank, environment, [*words, *more], folder)
        )
        for rank, more in enumerate([*[()] * (ranks - 1), of_last])
    ]
    for process in processes:
        process.start()
    return Ranks(words, folder, processes)


def run(folder: Path, ranks: int, *flags: str, **more: Any) -> subprocess.CompletedProcess:
    """Run a command to its end; see `start`."""
    return start(folder, ranks, *flags, **more).finish()


def _log(folder: Path, rank: int, stream: str) -> Path:
    return folder / f"rank-{rank}.{stream}"


def run_rank(rank: int, environment: dict[str, str], arguments: list[str], folder: Path) -> None:
    """Run a command in this process, with its output in files."""
    os.setsid()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    for number, stream in ((1, "out"), (2, "err")):
        descriptor = os.open(_log(folder, rank, stream), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def aot_eager_rank(*arguments: Any) -> None:
    """Run a command as `run_rank`, compiled without generating C++, which takes a minute."""
    building.compile_network = partial(compile_network, backend="aot_eager")
    run_rank(*arguments)


CLASSIFIER = """
model: {backbone: resnet10t, image_size: 32}
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 31}
curriculum: {preset: constant, epochs: 3, cost: area}
optim: {batch_size: 8, base_lr: 0.01}
recipe: {smoothing: 0.1, erasing: 0.25}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 1, evaluate_every: 50%, tensorboard: false}
"""
