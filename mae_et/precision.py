"""Which floating point a run computes in, and where it must be float32."""

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch

from mae_et.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, for what is data rather than network."""
    if device.type == "meta":  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype of a run's autocast, or None for float32.

    Raises:
        UserError: bf16 is asked for on a GPU that lacks it.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("efficiency.precision is bf16, which this GPU does not have; use fp16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Return the region in which a network's products run in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
