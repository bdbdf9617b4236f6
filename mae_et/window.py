"""The steps between two rows of metrics."""

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mae_et import distributed
from mae_et.curriculum import Plan, PlannedStage
from mae_et.data import Batch
from mae_et.errors import RunFailed
from mae_et.monitor import Row
from mae_et.optim import lr_at, weight_decay_at
from mae_et.step import Trainer


class Window:
    """Steps between two rows of metrics: sums stay on the device until the row is read."""

    def __init__(self) -> None:
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self.steps = 0
        self.loss: Tensor | None = None
        self.norm: Tensor | None = None
        self.waited = 0.0
        self.started = now

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, and count the time that they were waited for."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.norm = norm
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the time."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def close(self, trainer: Trainer, stage: PlannedStage) -> Row:
        """Return the row of the steps since the last one; the only wait for the device.

        Raises:
            RunFailed: the loss of one of them is not finite.
        """
        plan, state, world = trainer.plan, trainer.state, trainer.world
        assert self.loss is not None
        assert self.norm is not None
        numbers = torch.stack([self.loss / self.steps, self.norm.to(self.loss)])
        loss, norm = distributed.mean(numbers, world).tolist()
        now = time.perf_counter()
        seconds = now - self.started
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss became {loss} between steps {state.step - self.steps + 1} and "
                f"{state.step}; the last good checkpoint is kept in {trainer.config.output.folder}"
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
            "grad_norm": norm,
            "lr": lr_at(progress, trainer.config.optim),
            "weight_decay": weight_decay_at(progress, trainer.config.optim),
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
    """Return the most bytes that were held: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarise_stages(rows: list[Row], plan: Plan) -> list[dict[str, float]]:
    """Return bandwidth, images, last loss, images per second and FLOPs of each stage of a run."""
    summary = []
    for stage in plan.stages:
        mine = [row for row in rows if row["stage"] == stage.index]
        images = sum(row["window_steps"] for row in mine) * plan.batch_size
        seconds = sum(row["window_seconds"] for row in mine)
        summary.append(
            {
                "bandwidth": stage.bandwidth,
                "images": images,
                "loss": mine[-1]["loss"],
                "images_per_second": round(images / seconds, 1),
                "flops": stage.cost * images,
            }
        )
    return summary
