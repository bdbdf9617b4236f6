"""Non-finite losses and gradients: skip the update on the device, report at the next log step.

The decision is made on the device, from what all ranks have, so no rank waits for its device and
all ranks decide alike.
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
"""Updates in a row that the fp16 scaler may skip while it searches its scale: 2^16 to 2^-34."""


def propagate_nonfinite_loss(
    gradients: Sequence[Tensor], loss: Tensor, world: DistributedContext
) -> None:
    """Make the first gradient NaN on every rank if the loss of any rank is not finite.

    A gradient can be finite under a loss that is not, and each rank has its own loss. Whatever
    checks gradients afterwards, such as the fp16 scaler, then decides alike on all ranks.
    """
    lost = distributed.any_rank_async(~loss.isfinite(), world)
    first = gradients[0]
    local = first.to_local() if isinstance(first, DTensor) else first
    local.mul_(torch.where(lost, math.nan, 1.0))


def skip_update_unless_finite(optimizer: Any, norm: Tensor) -> None:
    """Make a fused optimizer skip its next update, step count included, if the norm is not finite.

    Sets the flag that `torch.amp.GradScaler` sets; the optimizer reads it on the device.
    """
    optimizer.found_inf = (~norm.isfinite()).float()


class Streak(NamedTuple):
    """Non-finite steps of a window, on the host, of the worst rank.

    Attributes:
        steps: number of non-finite steps.
        first: first of them, counted from 1; 0 if there is none.
        value: value of the first: NaN or infinity.
        longest: most such steps in a row, including those before the window.
    """

    steps: int
    first: int
    value: float
    longest: int


class NonFinite:
    """Count on the device the steps at which any of K numbers is not finite."""

    def __init__(self, kinds: int, device: torch.device):
        self.count, self.first, self.value, self.row, self.longest = torch.zeros(
            5, kinds, dtype=torch.float64, device=device
        )

    def add(self, values: Tensor, step: int) -> Tensor:
        """Count a step by its numbers; return which count as non-finite, bool [K].

        A number counts as non-finite if it or one before it in `values` is.

        Args:
            values: float [K].
            step: step of the window, counted from 1.
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
        """Start a window: keep the current run of non-finite steps, reset the rest."""
        self.longest = self.row
        self.count = self.first = self.value = torch.zeros_like(self.count)

    def numbers(self) -> Tensor:
        """Return count, first, value and longest of each number, float64 [K 4]."""
        return torch.stack([self.count, self.first, self.value, self.longest], dim=1)


def streak(each: Tensor) -> Streak:
    """Return the non-finite steps of any rank, from one number's rows of all ranks [ranks 4]."""
    count, _, _, longest = each.max(dim=0).values.tolist()
    lost = each[each[:, 1] > 0]
    if not len(lost):
        return Streak(0, 0, 0.0, int(longest))
    _, first, value, _ = lost[lost[:, 1].argmin()].tolist()
    return Streak(int(count), int(first), value, int(longest))


def check_state(run: Run) -> None:
    """Refuse non-finite weights or optimizer moments; every rank must call this.

    They can follow from a finite gradient if the learning rate is far too high.

    Raises:
        Diverged: a tensor is not finite on some rank.
    """
    state = run.state
    lost = next((name for name, tensor in _tensors(state) if not _is_finite(tensor)), None)
    if distributed.any_rank(lost is not None, run.world):
        raise Diverged(
            f"{lost or 'a weight of another rank'} is not finite after step {state.step}; it is "
            f"not saved; the last good checkpoint is kept in {run.config.output.dir}"
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
