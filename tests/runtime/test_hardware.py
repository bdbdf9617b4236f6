"""What is expected of cores and GPUs before PyTorch is loaded."""

import os
from pathlib import Path

import pytest

from mae_et.runtime import hardware
from mae_et.runtime.hardware import SET_BY_USER, expected_gpu, expected_threads

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
INFORMATION = "Model: \t\t {model}\nIRQ:   \t\t 28\nGPU UUID: \t {uuid}\nVideo BIOS: \t 96.00\n"


@pytest.mark.parametrize(
    ("models", "visible", "expected"),
    [
        ([], None, None),
        ([H100, H100], None, H100),
        ([H100, H100], "1,0", H100),
        ([H100, H100], "2", None),
        ([H100, H100], "", None),
        ([H100, H100], "-1", None),
        ([H100, A100], "GPU-1", A100),
        ([H100, A100], "GPU-7", None),
        ([H100, A100], "1", "GPU 1"),  # the first in CUDA's order is the fastest
        ([H100, H100], "MIG-5b6c", "GPU MIG-5b6c"),
    ],
)
def test_gpu_is_that_of_the_driver_which_cuda_visible_devices_selects(
    tmp_path: Path, monkeypatch, models: list[str], visible: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(hardware, "NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for number, model in enumerate(models):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        text = INFORMATION.format(model=model, uuid=f"GPU-{number}a5d")
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text(text)
    assert expected_gpu() == expected


def test_threads_are_those_of_pytorch_less_the_cores_that_load(monkeypatch) -> None:
    for name in SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(hardware, "_read", lambda _: "")  # no topology: every core is one
    assert [expected_threads(workers) for workers in (0, 2, 9)] == [8, 6, 1]
    monkeypatch.setattr(hardware, "_read", lambda path: str(int(path.parts[-3][3:]) // 2))
    assert [expected_threads(workers) for workers in (0, 2, 6)] == [4, 4, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert expected_threads(2) == 3
