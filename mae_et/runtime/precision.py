"""Floating-point formats of a run, and the parts that need float32."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from mae_et.errors import UserError


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, for computations on data instead of in the network."""
    if device.type == "meta":  # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.compiler.assume_constant_result  # a graph is compiled again when the switches change
def _products_are_exact() -> bool:
    with contextlib.suppress(RuntimeError):  # see `exact_products`
        return torch.get_float32_matmul_precision() == "highest"
    return False


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Keep float32 products on a GPU from running as TF32, which has 10 bits of mantissa.

    With `torch.compile`, it breaks the graph if TF32 is allowed: graphs hold no switches.
    """
    if _products_are_exact():
        yield
        return
    switch: Callable[[str], None] = torch.set_float32_matmul_precision
    try:
        before, exact = torch.get_float32_matmul_precision(), "highest"
    except RuntimeError:  # the caller has set PyTorch 2.9's newer switch, which excludes this one
        matmul: Any = torch.backends.cuda.matmul
        switch = partial(setattr, matmul, "fp32_precision")
        before, exact = matmul.fp32_precision, "ieee"
    switch(exact)
    try:
        yield
    finally:
        switch(before)


def allow_tf32(allowed: bool, device: torch.device) -> None:
    """Allow or forbid TF32 for float32 products on a GPU, in the whole process.

    Convolutions have a separate switch, which PyTorch enables by default.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast for `efficiency.precision`, or None for float32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if _has_bf16() else torch.float16
    if precision == "bf16" and device.type == "cuda" and not _has_bf16():
        raise UserError("efficiency.precision is bf16, which this GPU does not support; use fp16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _has_bf16() -> bool:
    """Whether the GPU supports bf16 in hardware; older ones emulate it, slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast runs a network in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
