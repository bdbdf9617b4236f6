"""Self-attention over short sequences on a GPU: one Triton program for each image and head.

At a bandwidth of 96 pixels the encoder sees 10 tokens, and the decoder 37. Library kernels work in
tiles of 64 or 128 tokens, and take 25% of a compiled training step for that. Here a program holds
all keys and values of its head, in tiles of 16 to 256 tokens.

The backward pass computes the attention weights again from queries and keys, and sums gradients
within one program: it needs nothing from the forward pass, and its results do not depend on the
order in which programs run, as they do where kernels add to queries' gradients atomically.

Shapes: B images, N tokens, H heads of D numbers, S tokens and E numbers of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_et.training.efficiency.attention import tile_side

ROWS = 64
"""Queries that a program handles at a time."""


def _warps(side: int) -> int:
    return {16: 1, 32: 2, 64: 4}.get(side, 8)


@torch.library.custom_op("mae_et::short_attention", mutates_args=())
def short_attention(qkv: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, [B N H*D], of bf16 or fp16 [B N 3*H*D] (q, k, v).

    The tokens must fit (`fits`).
    """
    images, tokens, width = qkv.shape
    width //= 3
    out = qkv.new_empty(images, tokens, width)
    _forward[(images * heads,)](
        qkv.contiguous(), out, tokens, (width // heads) ** -0.5, heads, width // heads,
        **_sizes(tokens, width // heads),
    )  # fmt: skip
    return out


@torch.library.custom_op("mae_et::short_attention_backward", mutates_args=())
def short_attention_backward(qkv: Tensor, grad: Tensor, heads: int) -> Tensor:
    """Return the gradient of `qkv` [B N 3*H*D], given that of the result, [B N H*D]."""
    images, tokens, width = grad.shape
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward[(images * heads,)](
        qkv.contiguous(), grad.contiguous(), grad_qkv, tokens, (width // heads) ** -0.5, heads,
        width // heads, **_sizes(tokens, width // heads),
    )  # fmt: skip
    return grad_qkv


def _sizes(tokens: int, width: int) -> dict[str, int]:
    side = tile_side(tokens)
    rows, numbers = min(side, ROWS), tile_side(width)
    return {"side": side, "rows": rows, "numbers": numbers, "num_warps": _warps(side)}


@short_attention.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@short_attention_backward.register_fake
def _(qkv: Tensor, grad: Tensor, heads: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, ctx.heads = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
    (qkv,) = ctx.saved_tensors
    return short_attention_backward(qkv, grad, ctx.heads), None


short_attention.register_autograd(_differentiate, setup_context=_save)


@triton.jit(do_not_specialize=["tokens"])
def _forward(  # type: ignore[no-untyped-def]
    qkv, out, tokens, scale, heads: tl.constexpr, width: tl.constexpr,
    side: tl.constexpr, rows: tl.constexpr, numbers: tl.constexpr,
):  # fmt: skip
    """Write the result of one head of one image."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    line, start = heads * width, head * width
    query = qkv + image.to(tl.int64) * tokens * 3 * line + start
    out += image.to(tl.int64) * tokens * line + start
    number = tl.arange(0, numbers)[None, :]
    key = tl.arange(0, side)[:, None]
    inside = (key < tokens) & (number < width)
    keys = tl.load(query + key * 3 * line + line + number, mask=inside, other=0)
    values = tl.load(query + key * 3 * line + 2 * line + number, mask=inside, other=0)
    for first in tl.range(0, side, rows, num_stages=1):
        row = first + tl.arange(0, rows)[:, None]
        mask = (row < tokens) & (number < width)
        queries = tl.load(query + row * 3 * line + number, mask=mask, other=0)
        exponentials, sums = _exponentials(queries, keys, tokens, scale, side)
        mixed = tl.dot(exponentials.to(values.dtype), values) / sums
        tl.store(out + row * line + number, mixed.to(values.dtype), mask=mask)


@triton.jit
def _exponentials(queries, keys, tokens, scale, side: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the unnormalised attention weights of some queries, and their sums."""
    scores = tl.dot(queries, tl.trans(keys)) * (scale * 1.4426950408889634)  # log2(e)
    scores = tl.where(tl.arange(0, side)[None, :] < tokens, scores, float("-inf"))
    exponentials = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return exponentials, tl.sum(exponentials, 1)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def _backward(  # type: ignore[no-untyped-def]
    qkv, grad, grad_qkv, tokens, scale, heads: tl.constexpr, width: tl.constexpr,
    side: tl.constexpr, rows: tl.constexpr, numbers: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the queries, keys and values of one head of one image."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    line, start = heads * width, head * width
    query = qkv + image.to(tl.int64) * tokens * 3 * line + start
    grad_query = grad_qkv + image.to(tl.int64) * tokens * 3 * line + start
    grad += image.to(tl.int64) * tokens * line + start
    number = tl.arange(0, numbers)[None, :]
    key = tl.arange(0, side)[:, None]
    inside = (key < tokens) & (number < width)
    keys = tl.load(query + key * 3 * line + line + number, mask=inside, other=0)
    values = tl.load(query + key * 3 * line + 2 * line + number, mask=inside, other=0)
    grad_keys = tl.zeros((side, numbers), tl.float32)
    grad_values = tl.zeros((side, numbers), tl.float32)
    for first in tl.range(0, side, rows, num_stages=1):
        row = first + tl.arange(0, rows)[:, None]
        mask = (row < tokens) & (number < width)
        queries = tl.load(query + row * 3 * line + number, mask=mask, other=0)
        grads = tl.load(grad + row * line + number, mask=mask, other=0)
        exponentials, sums = _exponentials(queries, keys, tokens, scale, side)
        weights = exponentials / sums
        grad_values += tl.dot(tl.trans(weights.to(values.dtype)), grads)
        grad_weights = tl.dot(grads, tl.trans(values))
        mean = tl.sum(weights * grad_weights, 1)[:, None]
        grad_scores = (weights * (grad_weights - mean) * scale).to(values.dtype)
        grad_keys += tl.dot(tl.trans(grad_scores), queries)
        grad_queries = tl.dot(grad_scores, keys).to(values.dtype)
        tl.store(grad_query + row * 3 * line + number, grad_queries, mask=mask)
    place = grad_query + key * 3 * line + number
    tl.store(place + line, grad_keys.to(values.dtype), mask=inside)
    tl.store(place + 2 * line, grad_values.to(values.dtype), mask=inside)
