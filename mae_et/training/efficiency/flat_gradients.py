"""Gradients in one buffer, which ranks average in one exchange, in place.

For passes that are replayed (`cuda_graphs.py`), which DistributedDataParallel cannot exchange. As
in its buckets, each gradient moves into its part of the buffer as soon as the backward pass has
made it, so that its own memory is reused at once. A graph captures that with the pass.
"""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from mae_et.runtime.distributed import DistributedContext

ALIGNMENT = 512
"""Bytes, as in torch's allocator: kernels read aligned tensors in wider words."""


class FlatGradients:
    """Make the gradients of parameters views of one buffer, from their first backward pass on.

    Parameters are of one type and device. A single rank needs no buffer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: DistributedContext):
        self.world = world
        if world.size == 1:
            return
        unit = ALIGNMENT // parameters[0].element_size()
        sizes = [-(-parameter.numel() // unit) * unit for parameter in parameters]
        self.buffer = parameters[0].new_zeros(sum(sizes))
        for parameter, part in zip(parameters, self.buffer.split(sizes), strict=True):
            view = part[: parameter.numel()].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(partial(_move, view))

    def average(self) -> None:
        """Average the gradients over all ranks, in place."""
        if self.world.size == 1:
            return
        device = self.buffer.device.type
        if f"{device}:nccl" in dist.get_backend_config():
            dist.all_reduce(self.buffer, dist.ReduceOp.AVG)
        else:  # divided before they are added, as in DistributedDataParallel
            dist.all_reduce(self.buffer.div_(self.world.size))


def _move(view: Tensor, parameter: nn.Parameter) -> None:
    """Move a parameter's new gradient into its view; later passes add to the view itself."""
    if parameter.grad is not None and parameter.grad is not view:
        parameter.grad = view.copy_(parameter.grad)
