"""Numbers that are none: updates left out on the device and counted there, read at the next row.

Whether an update is left out is decided where the gradient lies, and from what every process has,
so no process waits for its device to ask, and all decide alike.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae_et.errors import Diverged
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.run import Run

SCALER_PATIENCE = 50
"""Updates in a row that fp16's scaler may leave out in search of its scale: from 2^16 to 2^-34."""


def propagate_nonfinite_loss(
    gradients: Sequence[Tensor], loss: Tensor, world: DistributedContext
) -> None:
    """Make the first gradient NaN on every process where the loss of any is not finite.

    A gradient can be finite under a loss that is not, and losses are each process's own. Whoever
    looks at gradients then, fp16's scaler too, decides as all others do.
    """
    lost = distributed.any_rank_async(~loss.isfinite(), world)
    first = gradients[0]
    local = first.to_local() if isinstance(first, DTensor) else first
    local.mul_(torch.where(lost, math.nan, 1.0))


def skip_update_unless_finite(optimizer: Any, norm: Tensor) -> None:
    """Have a fused optimizer leave its next update out, step count included, if need be.

    It is the flag by which `torch.amp.GradScaler` tells it; it is read on the device.
    """
    optimizer.found_inf = (~norm.isfinite()).float()


class Streak(NamedTuple):
    """What was lost of some steps; numbers are on the host, and of the worst process."""

    steps: int
    """Steps that were lost."""
    first: int
    """The first of them, counted from 1; 0 where there is none."""
    value: float
    """What was there instead of a finite number."""
    longest: int
    """Most steps in a row, those before the window that they go on from included."""


class NonFinite:
    """Counts, on the device, the steps of which some of K numbers are not finite."""

    def __init__(self, kinds: int, device: torch.device):
        self.count, self.first, self.value, self.row, self.longest = torch.zeros(
            5, kinds, dtype=torch.float64, device=device
        )

    def add(self, values: Tensor, step: int) -> Tensor:
        """Count a step by its numbers [K]; return which are lost, bool [K].

        A number is lost if it, or one before it, is not finite.

        Args:
            values: the numbers.
            step: counted from 1 in the window.
        """
        lost = (~values.isfinite()).cumsum(0) > 0
        fresh = lost & (self.first == 0)
        self.value = torch.where(fresh, values.double(), self.value)
        self.first = torch.where(fresh, step, self.first)
        self.count = self.count + lost
        self.row = (self.row + 1) * lost
        self.longest = torch.maximum(self.longest, self.row)
        return lost

    def restart(self) -> None:
        """Begin a window: a row of lost steps goes on, the rest is forgotten."""
        self.longest = self.row
        self.count = self.first = self.value = torch.zeros_like(self.count)

    def numbers(self) -> Tensor:
        """Return what `streak` reads, float64 [K 4]."""
        return torch.stack([self.count, self.first, self.value, self.longest], dim=1)


def streak(each: Tensor) -> Streak:
    """Return what was lost on any process, from a kind's `numbers` [processes 4] of all."""
    count, _, _, longest = each.max(dim=0).values.tolist()
    lost = each[each[:, 1] > 0]
    if not len(lost):
        return Streak(0, 0, 0.0, int(longest))
    _, first, value, _ = lost[lost[:, 1].argmin()].tolist()
    return Streak(int(count), int(first), value, int(longest))


def check_state(run: Run) -> None:
    """Refuse to keep weights or an optimizer's moments that are not finite; every process must ask.

    A finite gradient may still lead to them, where the learning rate is out of all measure.

    Raises:
        Diverged: they are not.
    """
    state = run.state
    lost = next((name for name, tensor in _tensors(state) if not _is_finite(tensor)), None)
    if distributed.any_rank(lost is not None, run.world):
        raise Diverged(
            f"{lost or 'a weight of another process'} is not finite after step {state.step}; it is "
            f"not saved, and the last good checkpoint is kept in {run.config.output.dir}"
        )


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _named(state.model.named_parameters())
    yield from _named(state.model.named_buffers())
    if state.ema is not None:
        yield from _named(state.ema.named_parameters(), "average of ")
    for moments in state.optimizer.state.values():
        yield from _named(moments.items(), "optimizer's ")


def _named(pairs: Iterable[tuple[str, Any]], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in pairs:
        tensor = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            yield f"{prefix}{name}", tensor


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
