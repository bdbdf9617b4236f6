"""The steps between two rows of metrics."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from mae_et import distributed
from mae_et.curriculum import Plan, PlannedStage
from mae_et.errors import Diverged
from mae_et.monitor import Row
from mae_et.optim import lr_at, weight_decay_at
from mae_et.run import Run

AnyBatch = TypeVar("AnyBatch")


class Window:
    """Steps between two rows of metrics: sums stay on the device until the row is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self.steps = 0
        self.loss: Tensor | None = None
        self.norm: Tensor | None = None
        self.waited = 0.0
        self.started = now

    def timed(self, batches: Iterator[AnyBatch]) -> Iterator[AnyBatch]:
        """Pass batches on, and count the time that they were waited for."""
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield batch

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.norm = norm
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the time, if it takes any.

        Work that is still queued on the device is not waited for: a pause in which nothing is done
        costs nothing, and a longer one waits for it inside.
        """
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def close(self, run: Run, stage: PlannedStage) -> Row:
        """Return the row of the steps since the last one; the only wait for the device.

        Raises:
            Diverged: the loss of one of them, or the last one's gradient, is not finite.
        """
        plan, state, world = run.plan, run.state, run.world
        assert self.loss is not None
        assert self.norm is not None
        numbers = torch.stack([self.loss / self.steps, self.norm.to(self.loss)])
        loss, norm = distributed.mean(numbers, world).tolist()
        now = time.perf_counter()
        seconds = now - self.started
        # Under fp16 a step whose gradient overflowed is skipped; otherwise the weights are lost.
        lost = not math.isfinite(norm) and not state.scaler.is_enabled()
        if lost or not math.isfinite(loss):
            what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", norm)
            raise Diverged(
                f"the {what} became {value} between steps {state.step - self.steps + 1} and "
                f"{state.step}; the last good checkpoint is kept in {run.config.output.folder}"
            )
        state.seconds += seconds
        progress = plan.progress(state.step - 1)
        row: Row = {
            "step": state.step,
            "stage": stage.index,
            "bandwidth": stage.bandwidth,
            "magnitude": stage.magnitude,
            "epoch": state.step * plan.batch_size / plan.dataset_size,
            "equivalent_epochs": plan.progress(state.step) * plan.equivalent_epochs,
            "compute": plan.progress(state.step),
            "loss": loss,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": lr_at(progress, run.config.optim),
            "weight_decay": weight_decay_at(progress, run.config.optim),
            "images_per_second": self.steps * plan.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_gib": peak_memory(world.device) / 2**30,
            "seconds": state.seconds,
            "window_steps": self.steps,
            "window_seconds": seconds,
        }
        self._restart(now)
        return row


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held: of the GPU since the last call, of a process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summarise_stages(rows: list[Row], plan: Plan) -> list[dict[str, float | None]]:
    """Return bandwidth, images, last loss, images per second and compute of each stage of a run."""
    summary = []
    for stage in plan.stages:
        mine = [row for row in rows if row.get("stage") == stage.index]
        images = stage.steps * plan.batch_size
        seen = sum(row.get("window_steps", 0) for row in mine) * plan.batch_size
        seconds = sum(row.get("window_seconds", 0.0) for row in mine)
        summary.append(
            {
                "bandwidth": stage.bandwidth,
                "images": images,
                # None where the rows were lost, to a damaged disk.
                "loss": mine[-1].get("loss") if mine else None,
                "images_per_second": round(seen / seconds, 1) if seconds else None,
                "compute": stage.cost * images,
            }
        )
    return summary
