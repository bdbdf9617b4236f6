"""Non-finite losses and gradients: skip the update on the device, report at the next log step.

The decision is made on the device, from all ranks' numbers, so that no rank waits for its device
and all decide alike. Steps are counted on the host, when a row of metrics is read anyway.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae_et.errors import Diverged
from mae_et.runtime import distributed
from mae_et.training.run import Run

SCALER_PATIENCE = 50
"""Updates in a row that the fp16 scaler may skip while its scale falls from 2^16 to 2^-34."""


def nonfinite_with(scaled: Tensor, loss: Tensor) -> Tensor:
    """Return a scaled loss [] whose gradients are all NaN if the loss is not finite.

    Otherwise a gradient can be finite although the loss is not, and each rank has its own loss.
    Ranks exchange the NaN with the gradients, so later checks of these, such as the fp16 scaler's,
    decide alike on all ranks. Finite losses and their gradients stay the same, bit for bit.
    """
    return scaled * (1 + loss.detach() * 0)


def skip_update_unless_finite(optimizer: Any, norm: Tensor) -> None:
    """Make a fused optimizer skip its next update, step count included, if the norm is not finite.

    Sets the flag that `torch.amp.GradScaler` sets; the optimizer reads it on the device.
    """
    optimizer.found_inf = (norm * 0 != 0).float()  # NaN != 0, in fewer kernels than isfinite


class Streak(NamedTuple):
    """Non-finite steps of a window, on the host, for the worst rank.

    Attributes:
        steps: number of non-finite steps.
        first: the first of them, counted from 1; 0 if there are none.
        value: value of the first: NaN or infinity.
        longest: longest run of such steps, including those before the window.
    """

    steps: int
    first: int
    value: float
    longest: int


class NonFinite:
    """Count the steps at which any of K numbers is non-finite, window by window, on the host."""

    def __init__(self) -> None:
        self.row = torch.zeros((), dtype=torch.int64)
        """Non-finite steps in a row up to the last step, [ranks K]."""

    def count(self, values: Tensor) -> tuple[Tensor, list[Streak]]:
        """Count the steps of a non-empty window.

        Args:
            values: float [ranks steps K]. A number counts as non-finite if it, or an earlier one of
                the same step, is.

        Returns:
            Which numbers count as non-finite, bool [ranks steps K], and the K streaks.
        """
        nonfinite = (~values.isfinite()).cumsum(dim=-1) > 0
        longest = self.row
        for step in nonfinite.unbind(dim=1):
            self.row = (self.row + 1) * step
            longest = torch.maximum(longest, self.row)
        streaks = [
            _streak(nonfinite[..., kind], values[..., kind], int(longest[:, kind].max()))
            for kind in range(values.shape[-1])
        ]
        return nonfinite, streaks


def _streak(nonfinite: Tensor, values: Tensor, longest: int) -> Streak:
    """Return the non-finite steps of one number, from those of all ranks [ranks steps]."""
    if not nonfinite.any():
        return Streak(0, 0, 0.0, longest)
    first = int(nonfinite.any(dim=0).int().argmax())
    rank = int(nonfinite[:, first].int().argmax())
    return Streak(int(nonfinite.sum(dim=1).max()), first + 1, values[rank, first].item(), longest)


def check_state(run: Run) -> None:
    """Raise Diverged for non-finite weights or optimizer moments; every rank must call this.

    A finite gradient can cause them if the learning rate is far too high.
    """
    state = run.state
    # A sum is not finite if a number is not (or if it overflows), and takes a fraction of the time.
    # On a GPU, all are queued before the first is read.
    summed = [(name, tensor, tensor.detach().sum()) for name, tensor in _tensors(state)]
    suspects = [(name, tensor) for name, tensor, sum_ in summed if not math.isfinite(sum_.item())]
    damaged = next((name for name, tensor in suspects if not tensor.isfinite().all()), None)
    if distributed.any_rank(damaged is not None, run.world):
        raise Diverged(
            f"{damaged or 'a weight of another rank'} is not finite after step {state.step}; it is "
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
