"""Metrics of the steps since the last log step."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mae_et.curriculum.plan import PlannedStage
from mae_et.data.bad_images import BadImages
from mae_et.data.batch import AnyBatch
from mae_et.errors import Diverged
from mae_et.io.metrics_file import SCORES, Row, read_metrics
from mae_et.monitoring.divergence import last_loss
from mae_et.monitoring.summaries import summarise_probes
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.nonfinite import SCALER_PATIENCE, NonFinite, Streak
from mae_et.training.optim import lr_at, peak_scale, weight_decay_at
from mae_et.training.run import Run


class Sums(NamedTuple):
    """Metrics of a window over all ranks, on the host.

    Attributes:
        loss: mean over the steps with a finite loss; NaN if there are none.
        norm: gradient norm at the last step.
        first: loss of the first step.
        substituted: images that could not be read and were replaced by others.
        nonfinite_losses: steps with a non-finite loss.
        skipped_updates: steps with a non-finite loss or gradient.
    """

    loss: float
    norm: float
    first: float
    substituted: int
    nonfinite_losses: Streak
    skipped_updates: Streak


class MetricsWindow:
    """Steps since the last row of metrics; numbers stay on the device until the row is read."""

    def __init__(self, device: torch.device, bad_images: BadImages | None = None) -> None:
        self.device, self.bad_images = device, bad_images
        self.nonfinite = NonFinite()
        """Counts non-finite losses and updates."""
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self.numbers: list[Tensor] = []
        """Loss [] and gradient norm [] of each step, alternating."""
        self.waited = 0.0
        """Seconds spent waiting for batches, on a CPU."""
        self.waits: list[tuple[Any, Any]] = []
        """GPU events around each wait: end of the queued work, arrival of the batch."""
        self.checkpoint_seconds = 0.0
        """Seconds for which checkpoints held up training, not counted as training."""
        self.started = now

    def timed(self, batches: Iterator[AnyBatch]) -> Iterator[AnyBatch]:
        """Yield batches, and measure how long the device is idle while waiting for them.

        Python queues work ahead of a GPU, which is not idle while it has work.
        """
        while True:
            before, idle = time.perf_counter(), self._event()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if idle is None:
                self.waited += time.perf_counter() - before
            else:
                self.waits.append((idle, self._event()))
            yield batch

    def _event(self) -> Any:
        """Return an event at the end of the work queued on a GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).record_event(
            torch.cuda.Event(enable_timing=True)
        )

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Add a step, without launching work on the device."""
        self.numbers += [loss.detach(), norm.detach().to(loss)]

    @property
    def steps(self) -> int:
        """Number of steps since the last row."""
        return len(self.numbers) // 2

    @contextmanager
    def paused(self, works: bool) -> Iterator[None]:
        """Exclude the time spent inside.

        If the device gets work inside, wait for earlier work, which counts, and for that of the
        pause, which does not. Otherwise wait for nothing: an empty pause costs nothing.
        """
        self._wait(works)
        before = time.perf_counter()
        yield
        self._wait(works)
        self.started += time.perf_counter() - before

    def _wait(self, works: bool) -> None:
        if works and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self, run: Run, stage: PlannedStage) -> Row:
        """Return the row of the steps since the last one; the only synchronisation with the device.

        Raises:
            Diverged: the loss or the gradient was not finite for more steps in a row than
                `optim.max_skipped_updates`.
            RunFailed: more images are unreadable than `data.max_bad_fraction` allows.
        """
        plan, state, world = run.plan, run.state, run.world
        bad = self.bad_images
        sums = self._gather(len(bad.waiting) if bad else 0, world)
        now = time.perf_counter()
        seconds = now - self.started
        self._check(run, sums.nonfinite_losses, sums.skipped_updates)
        if bad and sums.substituted:
            bad.exchange(state.step)
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
            "loss": sums.loss if math.isfinite(sums.loss) else None,
            "grad_norm": sums.norm if math.isfinite(sums.norm) else None,
            "skipped_updates": sums.skipped_updates.steps,
            "substituted": sums.substituted,
            "unreadable": len(bad.known) if bad else 0,
            "lr": lr_at(progress, run.config.optim) * peak_scale(state.optimizer),
            "weight_decay": weight_decay_at(progress, run.config.optim),
            "images_per_second": self.steps * plan.batch_size / seconds,
            "data_time_fraction": self._waited() / seconds,
            "memory_gib": peak_memory(world.device) / 2**30,
            "seconds": state.seconds,
            "window_steps": self.steps,
            "window_seconds": seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
        }
        if state.step == self.steps:
            row["loss_at_start"] = sums.first  # the loss before any training
        self._restart(now)
        return row

    def _waited(self) -> float:
        """Return the seconds that the device waited for batches; call once its work is done."""
        return self.waited + sum(idle.elapsed_time(ready) for idle, ready in self.waits) / 1000

    def _gather(self, substituted: int, world: DistributedContext) -> "Sums":
        """Gather the numbers of all ranks, in one exchange and one copy to the host."""
        mine = torch.stack([*self.numbers, self.numbers[0].new_tensor(substituted)])
        each = distributed.all_gather(mine, world).cpu()  # [ranks, 2 * steps + 1]
        values = rearrange(each[:, :-1], "ranks (steps two) -> ranks steps two", two=2)
        nonfinite, (losses, updates) = self.nonfinite.count(values)
        loss = values[..., 0].masked_fill(nonfinite[..., 0], 0.0)
        good = (~nonfinite[..., 0]).sum(dim=1)
        mean = sum(loss.unbind(dim=1)) / good  # of each rank; 0 / 0 is NaN, ignored below
        norm, first, count = values[:, -1, 1], loss[:, 0], each[:, -1]
        return Sums(
            mean.double().nanmean().item(), norm.double().mean().item(),
            first.double().mean().item(), int(count.sum()), losses, updates,
        )  # fmt: skip

    def _check(self, run: Run, losses: Streak, updates: Streak) -> None:
        """Stop after too many non-finite steps in a row.

        In fp16, the scaler skips updates with overflowed gradients while it searches for its scale.
        """
        most = run.config.optim.max_skipped_updates
        patience = max(most, SCALER_PATIENCE) if run.state.scaler.is_enabled() else most
        for what, streak, limit in (("loss", losses, most), ("gradient's norm", updates, patience)):
            if streak.longest > limit:
                first = (
                    f" at step {run.state.step - self.steps + streak.first}" if streak.first else ""
                )
                in_a_row = f", for {streak.longest} updates in a row" if limit else ""
                raise Diverged(
                    f"the {what} became {streak.value}{first}{in_a_row}; the last good checkpoint "
                    f"is kept in {run.config.output.dir}"
                )


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU since the last call, or of this process.

    On a GPU this is memory reserved by PyTorch; allocated memory would exclude that of CUDA graphs.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pretraining_figures(run: Run) -> dict[str, Any]:
    """Return the entries of results.json that only pre-training has."""
    folder = run.config.output.dir
    probes = read_metrics(folder, SCORES)
    return {
        "loss": last_loss(read_metrics(folder)),
        "images": run.plan.images,
        **summarise_probes(probes, run.plan, run.state.seconds),
    }
