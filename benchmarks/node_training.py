"""Time a recipe's training steps on this machine's device, and the writing of a checkpoint."""

import dataclasses
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from mae_et.checkpoints.store import save_checkpoint
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.errors import one_line
from mae_et.runtime.console import say
from mae_et.runtime.system_errors import is_out_of_gpu_memory
from mae_et.training.efficiency.compile import compiler_fault
from mae_et.training.host_copy import HostCopy
from mae_et.training.optim import build_optimizer
from mae_et.training.plan import micro_batch_size
from mae_et.training.state import TrainState

from .training_step import network_of, reference_step, step_of, wait

MOST = 1024
"""Maximum number of images in a micro-batch at the base size."""
MOST_STEPS = 50
SLACK = 40.0
"""Seconds after which a step that does not end, such as one that compiles, is aborted."""
NOISE = 1.1
"""A small micro-batch that takes more than this many times as long as a large one was disturbed."""


def training_speeds(
    config: PretrainConfig, plan: Plan, device: torch.device, gpus: int, seconds: float
) -> list[dict[str, Any]]:
    """Time steps on random images in memory: eager and (on a GPU) compiled, two micro-batches.

    The large micro-batch is that of a run with this config: `efficiency.micro_batch`, or a GPU's
    share of the batch, as far as it fits; the small one is an eighth, as on eight times as many
    GPUs. The last row is the plain reference of `reference.py` at the base size, if the encoder is
    a published one; it is timed before compiled steps, whose compilation may take all of the time.

    Returns:
        Rows of `bandwidth`, `compiled`, `micro_batch`, `seconds` of a step (None if time or memory
        ran out), and `noisy` (see `mark_noise`).
    """
    bandwidths = plan.bandwidths[::-1]
    large = micro_batches(config, plan, gpus)
    small = {b: max(1, size // 8) for b, size in large.items()}
    ends = time.monotonic() + seconds
    kinds = (False, True) if _compiles(device) else (False,)
    # Time may run out: first what computes longest, then what is most bound by launching kernels.
    arms = [(large, b) for b in bandwidths] + [(small, b) for b in reversed(bandwidths)]
    rows, reference = list[dict[str, Any]](), list[dict[str, Any]]()

    def share() -> float:
        """Return an equal part of the time that is left."""
        remaining = len(kinds) * len(arms) + 1 - len(rows) - len(reference)
        return (ends - time.monotonic()) / remaining

    for compiled in kinds:
        compiled_for = len(bandwidths) if compiled else None
        built = network_of(config.model, device, compiled_for, config.optim)
        for sizes, bandwidth in arms:
            build = partial(
                step_of, built, config.model,
                bandwidth=bandwidth, precision=config.efficiency.precision, device=device,
            )  # fmt: skip
            size, taken = timed(build, sizes[bandwidth], share(), ends)
            rows.append(
                {
                    "bandwidth": bandwidth,
                    "compiled": compiled,
                    "micro_batch": size,
                    "seconds": taken,
                    "images_per_second": size / taken if taken else None,
                }
            )
        del build, built  # frees the network's memory before the next one is built
        if not compiled:
            reference = _reference(config, plan, device, large[max(bandwidths)], share(), ends)
    mark_noise(rows)
    return rows + reference


def _compiles(device: torch.device) -> bool:
    """Return whether `efficiency.compile: auto` compiles here; report a compiler that fails."""
    if device.type != "cuda":
        return False
    fault = compiler_fault(device)
    if fault:
        say(f"bench node: compiled steps are not measured: torch.compile fails: {fault}")
    return not fault


def mark_noise(rows: list[dict[str, Any]]) -> None:
    """Set `noisy` in each row: whether it took more than `NOISE` times as long as a larger one."""
    for row in rows:
        row["noisy"] = any(
            row["seconds"]
            and other["seconds"]
            and (row["bandwidth"], row["compiled"]) == (other["bandwidth"], other["compiled"])
            and row["micro_batch"] < other["micro_batch"]
            and row["seconds"] > NOISE * other["seconds"]
            for other in rows
        )


def micro_batches(config: PretrainConfig, plan: Plan, gpus: int) -> dict[int, int]:
    """Return a run's micro-batches by bandwidth; at most `MOST` images where they are fitted."""
    requested = config.efficiency.micro_batch
    share = dataclasses.replace(plan, batch_size=max(1, plan.batch_size // gpus))
    return micro_batch_size(MOST if requested in (None, "auto") else requested, share, 1)


class OutOfTime(BaseException):
    """A step did not end. Not an Exception, which the compiler would report as its own failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `seconds`, as soon as Python code runs again."""

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(
    build: Callable[[int], Callable[[], object]], size: int, seconds: float, ends: float
) -> tuple[int, float | None]:
    """Return the size that fits and the median time of a step; None if time or memory ran out.

    Also None, and a line, if a library fails: other steps may not need it.
    """
    if seconds <= 0:
        return size, None
    while True:
        try:
            with time_limit(ends + SLACK - time.monotonic()):
                return size, _median(build(size), seconds)
        except OutOfTime:
            return size, None
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                say(f"bench node: a step is not measured: {one_line(error)[:200]}")
                return size, None
        torch.cuda.empty_cache()
        if size == 1:
            return size, None
        size //= 2


def _median(step: Callable[[], object], seconds: float) -> float:
    ends, taken = time.monotonic() + seconds, list[float]()
    step()  # compiles, allocates
    if time.monotonic() < ends:
        step()
    while not taken or (time.monotonic() < ends and len(taken) < MOST_STEPS):
        before = time.perf_counter()
        step()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def _reference(
    config: PretrainConfig, plan: Plan, device: torch.device, size: int, seconds: float, ends: float
) -> list[dict[str, Any]]:
    """Return the row of a plain implementation in the same precision, if it supports the model."""
    model = config.model
    own = (model.encoder_embed_dim, model.encoder_depth, model.encoder_num_heads)
    if any(own) or model.decoder_attention != "self" or model.channels != 3:
        return []

    precision = config.efficiency.precision
    build = partial(reference_step, model, precision=precision, device=device)
    size, taken = timed(build, size, seconds, ends)
    row = {"bandwidth": plan.base, "compiled": False, "micro_batch": size}
    speed = size / taken if taken else None
    return [{"reference": True, **row, "images_per_second": speed, "seconds": None, "step": taken}]


def step_beside(
    config: PretrainConfig, device: torch.device
) -> Callable[[int, int], Callable[[], object]]:
    """Return a function that builds a network's step from a bandwidth and a number of images.

    The first step builds the network. As in a run, a step does not wait for the GPU, nor for
    decoding there.
    """
    built = cache(partial(network_of, config.model, device, None, config.optim))

    def step(bandwidth: int, size: int) -> Callable[[], object]:
        precision = config.efficiency.precision
        return step_of(built(), config.model, size, bandwidth, precision, device, waits=False)

    return step


def checkpoint_folder(config: PretrainConfig) -> Path:
    """Return the closest existing folder to the run folder."""
    run = config.output.dir.absolute()
    return next(folder for folder in (run, *run.parents) if folder.is_dir())


def checkpoint_seconds(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """Time the writing of a checkpoint of the recipe, to the file system of the run folder.

    Also the copy of its state that training waits for; None if there is no memory for one.
    """
    network, _, _ = network_of(config.model, device, None, config.optim)
    optimizer = build_optimizer(network, config.optim)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainState(network, optimizer, torch.amp.GradScaler(device.type, enabled=False))
    there = checkpoint_folder(config)
    with tempfile.TemporaryDirectory(dir=there) as folder:
        wait(device)
        before = time.perf_counter()
        path = save_checkpoint(Path(folder), state.to_dict(), "", {})
        taken = time.perf_counter() - before
        size = path.stat().st_size
    host = HostCopy()
    host.take(state.to_dict())  # allocates
    before = time.perf_counter()
    copied = host.take(state.to_dict())
    pause = None if copied is None else time.perf_counter() - before
    return {"folder": str(there), "bytes": size, "seconds": taken, "pause_seconds": pause}
