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
    line = heads * width
    query, result = (
        _head(qkv, tokens, heads, width, 3 * line),
        _head(out, tokens, heads, width, line),
    )
    keys = _load(query + line, 0, tokens, width, 3 * line, side, numbers)
    values = _load(query + 2 * line, 0, tokens, width, 3 * line, side, numbers)
    for first in tl.range(0, side, rows, num_stages=1):
        queries = _load(query, first, tokens, width, 3 * line, rows, numbers)
        exponentials, sums = _exponentials(queries, keys, tokens, scale, side)
        mixed = tl.dot(exponentials.to(values.dtype), values) / sums
        _store(result, mixed.to(values.dtype), first, tokens, width, line, rows, numbers)


@triton.jit(do_not_specialize=["tokens"])
def _backward(  # type: ignore[no-untyped-def]
    qkv, grad, grad_qkv, tokens, scale, heads: tl.constexpr, width: tl.constexpr,
    side: tl.constexpr, rows: tl.constexpr, numbers: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the queries, keys and values of one head of one image."""
    line = heads * width
    query, result = (
        _head(qkv, tokens, heads, width, 3 * line),
        _head(grad, tokens, heads, width, line),
    )
    grad_query = _head(grad_qkv, tokens, heads, width, 3 * line)
    keys = _load(query + line, 0, tokens, width, 3 * line, side, numbers)
    values = _load(query + 2 * line, 0, tokens, width, 3 * line, side, numbers)
    grad_keys = tl.zeros((side, numbers), tl.float32)
    grad_values = tl.zeros((side, numbers), tl.float32)
    for first in tl.range(0, side, rows, num_stages=1):
        queries = _load(query, first, tokens, width, 3 * line, rows, numbers)
        grads = _load(result, first, tokens, width, line, rows, numbers)
        exponentials, sums = _exponentials(queries, keys, tokens, scale, side)
        weights = exponentials / sums
        grad_values += tl.dot(tl.trans(weights.to(values.dtype)), grads)
        grad_weights = tl.dot(grads, tl.trans(values))
        mean = tl.sum(weights * grad_weights, 1)[:, None]
        grad_scores = (weights * (grad_weights - mean) * scale).to(values.dtype)
        grad_keys += tl.dot(tl.trans(grad_scores), queries)
        grad_queries = tl.dot(grad_scores, keys).to(values.dtype)
        _store(grad_query, grad_queries, first, tokens, width, 3 * line, rows, numbers)
    grad_keys, grad_values = grad_keys.to(values.dtype), grad_values.to(values.dtype)
    _store(grad_query + line, grad_keys, 0, tokens, width, 3 * line, side, numbers)
    _store(grad_query + 2 * line, grad_values, 0, tokens, width, 3 * line, side, numbers)


@triton.jit
def _exponentials(queries, keys, tokens, scale, side: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the unnormalised attention weights of some queries, and their sums."""
    scores = tl.dot(queries, tl.trans(keys)) * (scale * 1.4426950408889634)  # log2(e)
    scores = tl.where(tl.arange(0, side)[None, :] < tokens, scores, float("-inf"))
    exponentials = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return exponentials, tl.sum(exponentials, 1)[:, None]


@triton.jit
def _head(memory, tokens, heads, width, line):  # type: ignore[no-untyped-def]
    """Return where this program's head of its image begins, in rows of `line` numbers."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    return memory + image.to(tl.int64) * tokens * line + head * width


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    start, first, tokens, width, line, count: tl.constexpr, numbers: tl.constexpr
):
    """Return a tile of tokens from `first` on, zeros beyond the last."""
    row = first + tl.arange(0, count)[:, None]
    number = tl.arange(0, numbers)[None, :]
    mask = (row < tokens) & (number < width)
    return tl.load(start + row * line + number, mask=mask, other=0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    start, tile, first, tokens, width, line, count: tl.constexpr, numbers: tl.constexpr
):
    """Write a tile of tokens from `first` on."""
    row = first + tl.arange(0, count)[:, None]
    number = tl.arange(0, numbers)[None, :]
    tl.store(start + row * line + number, tile, mask=(row < tokens) & (number < width))
