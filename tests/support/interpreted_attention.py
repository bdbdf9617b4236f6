"""Print errors of short attention in Triton's interpreter, whose functions are made at import.

    TRITON_INTERPRET=1 python interpreted_attention.py TOKENS,HEADS,WIDTH ...

Prints one JSON list of [tokens, data type, error of the result, error of the gradient], relative to
float64.
"""

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(qkv: Tensor, heads: int) -> Tensor:
    """Attend by PyTorch's kernels: [B N 3*H*D] -> [B N H*D]."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((found.double() - expected).norm() / expected.norm())


def errors(tokens: int, heads: int, width: int, dtype: torch.dtype) -> list[float]:
    """Return the errors of the result and of the gradient of random numbers."""
    from mae_et.training.efficiency.short_attention import short_attention

    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * heads * width, generator=draw).to(dtype).requires_grad_()
    grad = torch.randn(2, tokens, heads * width, generator=draw).to(dtype)
    result = short_attention(qkv, heads)
    result.backward(grad)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(short_attention, (qkv, heads), test_utils=tests)  # type: ignore[arg-type]
    exact = qkv.detach().double().requires_grad_()
    expected = plain(exact, heads)
    expected.backward(grad.double())
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    assert qkv.grad is not None
    assert exact.grad is not None
    return [error(result.detach(), expected.detach()), error(qkv.grad, exact.grad)]


if __name__ == "__main__":
    dtypes = torch.float32, torch.float16  # the interpreter does not support bfloat16
    shapes = [tuple(map(int, shape.split(","))) for shape in sys.argv[1:]]
    print(json.dumps([[s[0], str(d), *errors(*s, d)] for s in shapes for d in dtypes]))
