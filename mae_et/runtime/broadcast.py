"""Broadcast a checkpoint that the main rank has read.

Content is nested dicts and lists of plain values and tensors. Its outline, in which tensors have
shapes but take no memory, is sent first; then the tensors, one by one, to their devices.
"""

import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mae_et.runtime.distributed import DistributedContext


def broadcast_outline(content: Any, world: DistributedContext) -> Any:
    """Return the main rank's content; on other ranks its tensors are zeros that take no memory.

    Every rank must call this.
    """
    if world.size == 1:
        return content
    packed = torch.empty(0, dtype=torch.uint8)
    if world.is_main:
        file = io.BytesIO()
        torch.save(tree_map_only(Tensor, _without_memory, content), file)
        packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    length = torch.tensor(len(packed))
    dist.broadcast(length, 0)
    if not world.is_main:
        packed = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(packed, 0)
    if world.is_main:
        return content
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)


def broadcast_tensors(content: Any, world: DistributedContext, device: torch.device) -> Any:
    """Return the main rank's content with its tensors, given its outline on other ranks.

    Every rank must call this. Tensors arrive on `device`, except scalars [], which stay on the CPU.
    """
    if world.size == 1:
        return content

    def sent(tensor: Tensor) -> Tensor:
        place = device if tensor.dim() else torch.device("cpu")
        if world.is_main:
            dist.broadcast(tensor.to(place).contiguous(), 0)
            return tensor
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=place)
        dist.broadcast(received, 0)
        return received

    return tree_map_only(Tensor, sent, content)


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
