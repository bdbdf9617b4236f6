"""Attend over short sequences with kernels of our own on a GPU (see `short_attention`)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from mae_et.errors import one_line
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext, any_rank

LEAST_SIDE = 16
"""Of the operands of a GPU's matrix units."""
MOST_NUMBERS = 2**13
"""Maximum size of the tile that a program holds of each of keys, values and their gradients."""
TOLERANCE = 0.02
"""Largest relative error of the kernels, in the Frobenius norm: bf16 rounds to 0.2%."""


class ShortAttention(Attention):
    """timm's self-attention, whose kernel is ours if the sequence is short."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B N W] -> [B N W]."""
        masks = (*args, *kwargs.values())  # which blocks pass even if there are none
        if any(each is not None and each is not False for each in masks) or not fits(
            x.shape[1], self.head_dim
        ):
            return super().forward(x, *args, **kwargs)
        return self.proj(torch.ops.mae_et.short_attention(self.qkv(x), self.num_heads))


def fits(tokens: int, width: int) -> bool:
    """Return whether the kernels support sequences of N tokens and heads of D numbers."""
    return tile_side(tokens) * tile_side(width) <= MOST_NUMBERS


def tile_side(size: int) -> int:
    """Return the side of a tile for a number of tokens, or of numbers of a head."""
    return max(LEAST_SIDE, 1 << (size - 1).bit_length())


def shorten_attention(
    model: nn.Module, dtype: torch.dtype | None, world: DistributedContext
) -> bool:
    """Replace the attention of a model's blocks, in place, if it runs in half precision on a GPU.

    Where the kernels cannot be used, or are wrong, on any rank, no rank uses them, and one line
    says so. Every rank must call this.

    Args:
        model: the model; its weights, and their names, stay the same.
        dtype: autocast dtype.
        world: the ranks.

    Returns:
        Whether any was replaced.
    """
    modules = [module for module in model.modules() if _is_plain(module)]
    if not modules:
        fault = "the model has no self-attention of timm's without normalisation and dropout"
    elif world.device.type != "cuda" or dtype is None:
        fault = "ours needs half precision on a GPU"
    else:
        fault = attention_fault(world.device, dtype)
    if any_rank(bool(fault), world):
        reason = fault or "on another rank"
        notify(f"attention is PyTorch's (efficiency.attention short): {reason}")
        return False
    for module in modules:
        module.__class__ = ShortAttention
    return True


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is timm's attention without normalisation, gates or dropout."""
    if type(module) is not Attention:
        return False
    extras = (getattr(module, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
    dropped = module.attn_drop.p + module.proj_drop.p
    return not dropped and all(e is None or isinstance(e, nn.Identity) for e in extras)


def attention_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the kernels cannot be used on a device; an empty string if they can."""
    heads, width = 2, 32
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 37, 3 * heads * width, generator=draw)
    grad = torch.randn(3, 37, heads * width, generator=draw)
    exact = qkv.to(dtype).double().requires_grad_()
    expected = _plain(exact, heads)
    expected.backward(grad.to(dtype).double())
    assert exact.grad is not None
    try:
        from mae_et.training.efficiency.short_attention import short_attention

        inputs = qkv.to(device, dtype).requires_grad_()
        result = short_attention(inputs, heads)
        result.backward(grad.to(device, dtype))
        assert inputs.grad is not None
        errors = [_error(result, expected), _error(inputs.grad, exact.grad)]
    except Exception as error:  # Triton is not installed, has no compiler, or an old GPU
        return one_line(error)[:200]
    wrong = [error for error in errors if not error < TOLERANCE]
    return f"the kernels are wrong (relative error {max(wrong):.2g})" if wrong else ""


def _plain(qkv: Tensor, heads: int) -> Tensor:
    images, tokens, width = qkv.shape
    q, k, v = qkv.view(images, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(images, tokens, width // 3)


def _error(found: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())
