"""Recognise MAE's fixed sine-cosine positions in weights."""

import math
from pathlib import Path

import torch
from torch import Tensor

from mae_et.models.pos_embed import extent_of, sincos_positions
from mae_et.runtime.console import notify


def fixed_grid_of(positions: Tensor) -> int | None:
    """Return the side of the full grid of fixed sine-cosine positions [1 1+N W]; None if learned.

    It differs from the side of the N patches if the model was trained with `position_grid`.
    """
    _, tokens, width = positions.shape
    side = math.isqrt(tokens - 1)
    if tokens != side * side + 1 or tokens < 2 or width % 4 or not positions.isfinite().all():
        return None
    table = torch.zeros_like(positions)
    for extent in (side, extent_of(positions[0, 1:], side)):
        table[0, 1:] = sincos_positions((side, side), (extent, extent), width, table.device)
        if is_sincos(positions, table):
            return extent
    return None


def is_sincos(positions: Tensor, table: Tensor) -> bool:
    """Compare positions with MAE's table, in float32 or rounded to half precision."""
    return any(
        torch.allclose(positions, table.to(dtype).float(), atol=1e-4)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def without_positions(path: Path, decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a decoder without its positions, which are computed; empty if they are learned.

    A decoder that is not read is reported on stderr.
    """
    table = decoder.get("pos_embed")
    if table is None or (table.ndim == 3 and fixed_grid_of(table) is not None):
        return {name: tensor for name, tensor in decoder.items() if name != "pos_embed"}
    notify(f"{path}: its decoder is not read: its positions are not MAE's fixed sine-cosine table")
    return {}
