import contextlib
from collections.abc import Iterator

import pytest
import torch

from mae_et import UserError
from mae_et.runtime.precision import (
    allow_tf32,
    autocast,
    autocast_dtype,
    exact_products,
    full_precision,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_bf16_where_a_gpu_computes_in_it_and_does_not_emulate(
    monkeypatch, native: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert autocast_dtype("auto", CUDA) == expected
    assert autocast_dtype("fp32", CUDA) is None
    if native:
        assert autocast_dtype("bf16", CUDA) == torch.bfloat16
    else:
        with pytest.raises(UserError, match="does not support; use fp16"):
            autocast_dtype("bf16", CUDA)


def test_a_cpu_computes_in_float32_unless_asked() -> None:
    assert autocast_dtype("auto", CPU) is None
    assert autocast_dtype("bf16", CPU) == torch.bfloat16
    x = torch.randn(4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(dtype, CPU):
            assert (x @ x).dtype == dtype
        with full_precision(CPU):
            assert (x @ x).dtype == torch.float32
    with autocast(None, CPU):
        assert (x @ x).dtype == torch.float32


@pytest.mark.slow  # PyTorch imports sympy
def test_a_graph_holds_no_products_that_may_be_inexact() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def square(x: torch.Tensor) -> torch.Tensor:
        with exact_products():
            return x @ x

    assert torch.equal(square(torch.eye(2)), torch.eye(2))
    torch.set_float32_matmul_precision("high")
    with pytest.raises(torch._dynamo.exc.Unsupported):  # without fullgraph, the graph is broken
        square(torch.eye(2))


def test_exact_products_put_the_precision_back_also_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    with contextlib.suppress(RuntimeError), exact_products():
        inside = torch.get_float32_matmul_precision()
        raise RuntimeError
    assert inside == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch below 2.9"
)
def test_products_are_exact_in_a_process_that_uses_the_newer_switch() -> None:
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with exact_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_tf32_is_allowed_to_products_and_convolutions_alike_and_on_a_gpu_alone() -> None:
    """Torch allows it to convolutions by itself; a run before in this process may have, too."""
    for allowed, products in ((True, "high"), (False, "highest")):
        allow_tf32(allowed, CUDA)
        allow_tf32(not allowed, CPU)
        assert torch.get_float32_matmul_precision() == products
        assert torch.backends.cudnn.allow_tf32 is allowed
