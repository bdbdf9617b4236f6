"""Start runs in their own processes, and compare their results."""

import multiprocessing
import os
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from driver import main
from tiny_run import TINY

from mae_et.checkpoints.store import newest_checkpoint

DRIVER = Path(__file__).with_name("driver.py")
CLASSIFIER = """
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 30, scale: [0.5, 1.0],
       augment: rand-mstd0.5-inc1}
curriculum: {preset: custom, epochs: 3, cost: area,
             stages: [{bandwidth: 16, share: 1}, {bandwidth: 32, share: 2}]}
recipe: {smoothing: 0.1, erasing: 0.25}
optim: {batch_size: 8, base_lr: 0.05, ema: 0.9, warmup_fraction: 0.2}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 1, checkpoint_every: 5, evaluate_every: 25%, tensorboard: false}
"""
CONFIGS = {"pretrain": TINY, "finetune": CLASSIFIER, "supervised": CLASSIFIER}
QUIET = ("--output.tensorboard=false",)
FORK = multiprocessing.get_context("fork")


class Started:
    """One rank of a run in a process of its own, forked: torch is there already."""

    def __init__(
        self, folder: Path, fault: str, flags: tuple[str, ...], rank: int, before=None,
        command: str = "pretrain",
    ):  # fmt: skip
        config = folder.with_name(f"{folder.name}.yaml")  # which `start` has written
        self.said = folder.with_name(f"{folder.name}-{rank}.log")
        words = [command, f"--config={config}", f"--output.dir={folder}", *flags]

        def target() -> None:
            descriptor = os.open(self.said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            # pytest's capture has put other files in their place.
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            torch.set_num_threads(1)
            if before is not None:
                before()
            try:
                code = main(fault, words)
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stderr.flush()
            end_children()
            os._exit(code)

        self.process = FORK.Process(target=target)
        self.process.start()

    def end(self, seconds: float = 180) -> tuple[int, str]:
        """Return the exit status and what was said."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            logs = sorted(self.said.parent.glob("*.log"))  # also of the ranks that it waits for
            said = "\n".join(f"{log.name}: {log.read_text()}" for log in logs)
            raise AssertionError(f"{self.said.name} still runs after {seconds} s:\n{said}")
        return self.process.exitcode, self.said.read_text()


def end_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def start(
    folder: Path, fault: str, *flags: str, processes: int = 1, before=None,
    command: str = "pretrain",
) -> list[Started]:  # fmt: skip
    """Start a training with a fault in it; the run folder is `folder`."""
    # Once, before any rank: one that is reading it would find it empty while it is written anew.
    folder.with_name(f"{folder.name}.yaml").write_text(CONFIGS[command])
    if processes == 1:
        return [Started(folder, fault, flags, 0, before, command)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def place(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip

    ranks = range(processes)
    return [Started(folder, fault, flags, r, partial(place, r), command) for r in ranks]


def run(
    folder: Path, fault: str, *flags: str, processes: int = 1, before=None,
    command: str = "pretrain",
) -> tuple[int, str]:  # fmt: skip
    """Return the exit status of the main process and what it said, once all have ended."""
    started = start(folder, fault, *flags, processes=processes, before=before, command=command)
    first, *_ = [one.end() for one in started]
    return first


def same_weights(folder: Path, other: Path) -> bool:
    """Return whether two runs end with the same model and optimizer, bit for bit."""
    one, two = (newest_checkpoint(place / "checkpoints") for place in (folder, other))
    assert one is not None
    assert two is not None
    return one["step"] == two["step"] and all(equal(one[k], two[k]) for k in ("model", "optimizer"))


def equal(one: object, two: object) -> bool:
    """Compare what a checkpoint holds, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two
