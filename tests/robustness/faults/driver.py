"""`python driver.py FAULT COMMAND ...`: the command line of mae-et, with one fault put in it.

A fault reads NAME or NAME:key=value,...; `rank` (any) and `step` (0) say where it strikes. It is
put into this process alone: launched by torchrun, each process has its own.

Faults at a step strike in pre-training and in classifiers alike.
"""

import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path


def main(fault: str, arguments: list[str]) -> int:
    """Run the command line with a fault in it."""
    name, _, rest = fault.partition(":")
    facts = dict(pair.split("=") for pair in rest.split(",") if pair)
    if facts.pop("rank", None) in {None, os.environ.get("RANK", "0")}:
        FAULTS[name](**facts)
    from mae_et.cli.main import main as command_line

    return command_line(arguments)


sys.path.append(str(Path(__file__).parents[2] / "support"))


def replace_steps(around) -> None:
    """Wrap the training step with `around`."""
    from mae_et.training import loop

    loop.train_step = around(loop.train_step)


def at_step(step: int, strike) -> None:
    """Call `strike` before a step, which then continues."""
    from steps import wait_for_checkpoint

    def around(real):
        def struck(run, *rest):
            if run.state.step == step:
                wait_for_checkpoint(run)
                strike()
            return real(run, *rest)

        return struck

    replace_steps(around)


def hang(step: str) -> None:
    """Block forever in C, where no Python signal handler runs."""
    at_step(int(step), lambda: ctypes.CDLL(None).sleep(10_000))


def die(step: str, starts: str = "inf") -> None:
    """Kill this process as the kernel does out of memory, in the first starts of torchrun."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < float(starts):
        at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail(step: str, on: str, kind: str) -> None:
    """Raise an error on one rank; teardown waits for all ranks, as NCCL's does."""
    import torch
    import torch.distributed as dist

    real = dist.destroy_process_group

    def waiting() -> None:
        store = dist.distributed_c10d._get_default_store()
        store.add("leaving", 1)
        while store.add("leaving", 0) < dist.get_world_size():
            time.sleep(0.05)
        real()

    def strike() -> None:
        raise {
            "oom": torch.OutOfMemoryError("CUDA out of memory"),
            "bug": ZeroDivisionError("a bug"),
        }[kind]

    dist.destroy_process_group = waiting
    if on == os.environ.get("RANK", "0"):
        at_step(int(step), strike)


def fail_in(function: str) -> None:
    """Run out of GPU memory in each call of a function, named by the module that calls it."""
    import torch

    def struck(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module, _, name = function.rpartition(".")
    setattr(importlib.import_module(module), name, struck)


def stop(step: str) -> None:
    """Send SIGTERM to this process before a step."""
    at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGTERM))


def lose_worker(step: str) -> None:
    """Kill a loader process."""
    at_step(int(step), lambda: multiprocessing.active_children()[0].kill())


def stop_and_go(step: str, seconds: str) -> None:
    """Suspend this process for `seconds`, as SLURM suspends a job."""

    def suspend() -> None:
        if os.fork() == 0:
            time.sleep(float(seconds))
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

    at_step(int(step), suspend)


def clock(step: str, jump: str) -> None:
    """Set the wall clock forward or back; imports come later, so all of Python sees it."""
    real, off = time.time, [0.0]
    time.time = lambda: real() + off[0]
    at_step(int(step), lambda: off.__setitem__(0, float(jump)))


def slow_disk(seconds: str) -> None:
    """Delay every fsync by `seconds`."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(float(seconds))
        real(descriptor)

    os.fsync = slow


def record(path: str, stop: str = "-1") -> None:
    """Record a hash of every trained sample (image, and noise or label) in order.

    Send SIGTERM before the step `stop`, if given.
    """
    rank = int(os.environ.get("RANK", "0"))
    place = Path(f"{path}-{rank}")

    def around(real):
        def recorded(run, stage, batches, loss_of):
            def passing():
                for batch in batches:
                    for image, other in zip(*batch[:2], strict=True):
                        digest = hashlib.sha256(image.numpy().tobytes() + other.numpy().tobytes())
                        with place.open("a") as file:
                            row = [run.state.step, rank, digest.hexdigest()[:16]]
                            file.write(json.dumps(row) + "\n")
                    yield batch

            return real(run, stage, passing(), loss_of)

        return recorded

    replace_steps(around)
    at_step(int(stop), lambda: os.kill(os.getpid(), signal.SIGTERM))


FAULTS = {
    "none": lambda: None,
    "hang": hang,
    "die": die,
    "fail": fail,
    "fail_in": fail_in,
    "stop": stop,
    "lose_worker": lose_worker,
    "stop_and_go": stop_and_go,
    "clock": clock,
    "slow_disk": slow_disk,
    "record": record,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
