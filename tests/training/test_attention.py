"""Attention over short sequences is PyTorch's, up to rounding, and compiles for GPUs."""

import importlib
import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import interpreted_attention
import pytest
import torch
from interpreted_attention import plain
from small_mae import small
from torch import Tensor

from mae_et.runtime.distributed import DistributedContext
from mae_et.training.efficiency import attention
from mae_et.training.efficiency.attention import fits, shorten_attention

KERNELS = "mae_et.training.efficiency.short_attention"
SHORT = (10, 3, 64), (1, 1, 16), (37, 2, 32), (17, 1, 80), (70, 1, 16)
LONG = (50, 1, 64), (101, 1, 32), (197, 1, 32)
"""Tokens, heads, and numbers of a head: of ViTs at 96, 160 and 224 pixels, and odd ones."""


@pytest.mark.parametrize("shapes", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_softmax(
    shapes: tuple[tuple[int, int, int], ...],
) -> None:
    """In Triton's interpreter."""
    pytest.importorskip("triton", minversion="3.8", reason="older interpreters need NumPy < 2.4")
    assert all(fits(tokens, width) for tokens, _, width in shapes)
    words = [",".join(map(str, shape)) for shape in shapes]
    command = [sys.executable, interpreted_attention.__file__, *words]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    printed = subprocess.check_output(command, env=environment, text=True)
    rows = json.loads(printed.splitlines()[-1])
    assert len(rows) == 2 * len(shapes)
    for _, dtype, *errors in rows:
        assert max(errors) < {"torch.float32": 2e-6, "torch.float16": 1e-3}[dtype]


@pytest.mark.parametrize(
    "sizes", [(16, 16, 64, 1), pytest.param((256, 64, 32, 8), marks=pytest.mark.slow)]
)
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path, monkeypatch, sizes) -> None:
    """For an H100, by the assembler in Triton's wheel."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module(KERNELS)
    side, rows, numbers, warps = sizes
    constants = {"heads": 12, "width": numbers, "side": side, "rows": rows, "numbers": numbers}
    types = dict.fromkeys(("qkv", "out", "grad", "grad_qkv"), "*bf16")
    types |= {"tokens": "i32", "scale": "fp32"}
    for kernel in (kernels._forward, kernels._backward):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()})
        options = {"num_warps": warps}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]


def test_blocks_of_a_model_use_it_where_it_fits(monkeypatch) -> None:
    """With the same weights under the same names; long sequences keep PyTorch's."""
    model = small()
    images, mask = torch.rand(2, 3, 32, 32), 0.5
    torch.manual_seed(0)
    before, names = model(images, mask).loss, list(model.state_dict())
    used: list[int] = []

    def short(qkv: Tensor, heads: int) -> Tensor:
        used.append(qkv.shape[1])
        return plain(qkv, heads)

    monkeypatch.setattr(attention, "attention_fault", lambda *_: "")
    gpu = DistributedContext(0, 1, torch.device("cuda"))
    assert shorten_attention(model, torch.bfloat16, gpu)
    assert list(model.state_dict()) == names
    monkeypatch.setattr(torch.ops.mae_et, "short_attention", short, raising=False)
    torch.manual_seed(0)
    torch.testing.assert_close(model(images, mask).loss, before)
    depth = len(model.encoder.blocks) + len(model.decoder.blocks)
    assert len(used) == depth
    monkeypatch.setattr(attention, "MOST_NUMBERS", 0)
    model(images, mask)
    assert len(used) == depth


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "ours needs half precision on a GPU"),
        ("cuda", None, "ours needs half precision on a GPU"),
        ("cuda", torch.bfloat16, "the kernels are wrong"),
    ],
)
def test_a_run_says_why_it_keeps_pytorchs(monkeypatch, capsys, device, dtype, reason) -> None:
    attention.notify.cache_clear()
    model = small()
    monkeypatch.setattr(attention, "attention_fault", lambda *_: "the kernels are wrong")
    world = DistributedContext(0, 1, torch.device(device))
    assert not shorten_attention(model, dtype, world)
    assert f"(efficiency.attention short): {reason}" in capsys.readouterr().err
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Attention" in kinds
    assert "ShortAttention" not in kinds


def test_wrong_and_failing_kernels_are_found(monkeypatch, capsys) -> None:
    cpu = torch.device("cpu")
    fault = attention.attention_fault(cpu, torch.float16)
    assert fault  # there is no GPU, or no Triton
    module: Any = ModuleType(KERNELS)
    monkeypatch.setitem(sys.modules, KERNELS, module)
    module.short_attention = lambda qkv, heads: plain(qkv, heads)
    assert attention.attention_fault(cpu, torch.float16) == ""
    module.short_attention = lambda qkv, heads: 1.1 * plain(qkv, heads)
    assert "the kernels are wrong (relative error 0.1" in attention.attention_fault(
        cpu, torch.float16
    )
