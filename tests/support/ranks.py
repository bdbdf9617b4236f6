"""Run a command of mae-et on one rank or several."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tiny_run import TINY

# Importing PyTorch takes a rank most of its time: a server imports it once and forks for each.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["mae_et.cli.main", "mae_et.pretraining", "finetune.classifier"])


def run(
    folder: Path, ranks: int, *flags: str, command: str = "pretrain", yaml: str = TINY,
    of_last: Sequence[str] = (),
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a command on ranks that join over gloo, in the folder's subfolder named after them.

    `launch` starts them as a user does, which takes seconds more. The last rank has the flags
    `of_last` too.

    Returns:
        The first exit status other than zero, and what the ranks printed, in their order.
    """
    arguments = _arguments(folder, ranks, *flags, command=command, yaml=yaml)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment = address | {"WORLD_SIZE": str(ranks)}
    processes = [
        RANKS.Process(target=_rank, args=(rank, environment, [*arguments, *more], folder))
        for rank, more in enumerate([*[()] * (ranks - 1), of_last])
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # if it is still there
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    out, error = (
        "".join(_log(folder, rank, stream).read_text() for rank in range(ranks))
        for stream in ("out", "err")
    )
    return subprocess.CompletedProcess(arguments, failed[0] if failed else 0, out, error)


def launch(folder: Path, ranks: int, *flags: str) -> subprocess.Popen:
    """Start a pre-training by torchrun."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
             "-m", "mae_et", *_arguments(folder, ranks, *flags)]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _arguments(
    folder: Path, ranks: int, *flags: str, command: str = "pretrain", yaml: str = TINY
) -> list[str]:
    config = folder / "tiny.yaml"
    config.write_text(yaml)
    return [command, f"--config={config}", f"--output.dir={folder / str(ranks)}", *flags]


def _log(folder: Path, rank: int, stream: str) -> Path:
    return folder / f"rank-{rank}.{stream}"


def _rank(rank: int, environment: dict[str, str], arguments: list[str], folder: Path) -> None:
    """Run a command in this process, with its output in files."""
    import torch

    from mae_et.cli.main import main

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


CLASSIFIER = """
model: {backbone: resnet10t, image_size: 32}
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 31}
curriculum: {preset: constant, epochs: 3, cost: area}
optim: {batch_size: 8, base_lr: 0.01}
recipe: {smoothing: 0.1, erasing: 0.25}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 1, evaluate_every: 50%, tensorboard: false}
"""
