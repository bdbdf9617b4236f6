"""The device that these tests compare with the CPU: `make test-gpu`.

`--gpu-device cpu` runs their bodies on the CPU, where they must pass trivially.
"""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from mae_et.data.device.choose_decoder import _find_decoder

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of this folder; deselect those that `--gpu-results` says have passed."""
    path = config.getoption("--gpu-results")
    lines = path.read_text("utf-8").splitlines() if path is not None and path.exists() else []
    passed = set()
    for line in lines:
        with contextlib.suppress(ValueError):  # half-written
            row = json.loads(line)
            passed |= {row["test"]} if row["outcome"] == "passed" else set()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """Append each result to `--gpu-results`, so that none is lost where the tests are cut off."""
    report = yield
    path = item.config.getoption("--gpu-results")
    if path is not None and (report.when == "call" or not report.passed):
        error = report.longreprtext.splitlines()[-8:]
        seconds = round(report.duration, 1)
        row = {"test": item.nodeid, "outcome": report.outcome, "seconds": seconds, "error": error}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return report


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The GPU, or the CPU with `--gpu-device cpu`; skips where the GPU is missing."""
    found = torch.device(pytestconfig.getoption("--gpu-device"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here (--gpu-device cpu runs the test's body)")
    return torch.device("cuda", 0) if found.type == "cuda" else found


@pytest.fixture(scope="session")
def decode(device: torch.device) -> str:
    """Where runs decode JPEGs, `cpu` or `gpu`; skips where no library decodes on the GPU."""
    found, reason = _find_decoder(device)
    if device.type == "cuda" and found is None:
        pytest.skip(reason)
    return "gpu" if device.type == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def _float32_products():
    """Compute float32 products in float32, not in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
