"""Refuse weights that are not plain, finite numbers."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mae_et.errors import UserError

_QUANTISED = {torch.int8, torch.uint8, torch.int16, torch.int32}


def check_finite(path: Path, tensors: Mapping[str, Tensor], read: Iterable[str]) -> None:
    """Refuse tensors with infinities or NaN, among those whose names are `read`.

    Others may have them on purpose, as the mask of CLIP's text tower.
    """
    for name in read:
        if name in tensors and not tensors[name].isfinite().all():
            raise UserError(f"{path} holds weights that are not finite numbers ({name})")


def as_float32(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert any floating-point format; refuse sparse and quantised weights."""
    converted = {}
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
        if not dense or tensor.is_complex() or tensor.device.type != "cpu":
            raise UserError(f"{path} holds sparse, complex or quantised weights ({name})")
        if tensor.dtype in _QUANTISED and tensor.ndim > 1:
            raise UserError(f"{path} holds quantised weights ({name}, {tensor.dtype})")
        converted[name] = tensor.float() if tensor.is_floating_point() else tensor
    return converted
