"""Hold the memory that loading takes on a device, while the memory of training is measured."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mae_et.config.efficiency import DecodePlace
from mae_et.data.device.decode_ahead import AHEAD

DECODER_BYTES = 2**31
"""GPU memory that a `DeviceDecoder` takes, without finished images (see its module)."""


@contextlib.contextmanager
def memory_ahead(
    requested: DecodePlace, images: Tensor, device: torch.device, kept: int
) -> Iterator[list[Tensor]]:
    """Hold as much memory on a device as loading may, while a micro-batch is trained on.

    The memory of a pass on `images` [B C H H] is measured beside it (`efficiency.micro_batch:
    auto`). A decoder keeps `kept` images for `data.replay`. Nothing is allocated on a CPU, where
    loader processes decode.
    """
    held: list[Tensor] = []
    if device.type != "cpu":  # the batch in use and the next one, decoded there or copied to it
        held = [torch.empty_like(images, device=device) for _ in range(AHEAD)]
        if requested != "cpu":
            taken = DECODER_BYTES + kept * images[0].nbytes
            held.append(torch.empty(taken, dtype=torch.uint8, device=device))
    yield held
