"""Fixtures shared by test files: a tiny run, a working folder, a SLURM cluster."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from slurm_cluster import Cluster, missing_programs, start_cluster
from tiny_run import IMAGES, TINY, config_in

import mae_et  # which loads PyTorch where it is used: xdist's controller needs none

# In this order, before all others, so that no worker is left with one of them at the end.
LONGEST = (
    "test_slurm.py", "test_distributed.py", "test_cli.py", "test_pretraining.py",
    "test_classifier.py", "test_bad_images.py", "test_whole_searches.py", "test_micro_batch.py",
    "test_nonfinite.py", "test_resume.py",
)  # fmt: skip

# A busy machine takes as long as it takes; folders may be shared by the examples of a test.
settings.register_profile(
    "busy", deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests of GPUs run on another device, and in several calls."""
    parser.addoption("--gpu-device", choices=("cuda", "cpu"), default="cuda", help="of tests/gpu")
    parser.addoption("--gpu-results", type=Path, help="JSON lines; what has passed is not run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest; the first of them waits for SLURM."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _autograd_without_threads():
    """Start autograd, which starts a thread for each device that PyTorch knows by then.

    Fake tensors add eight devices, and PyTorch refuses backward passes in processes that are forked
    beside such threads.
    """
    import torch

    if not torch.cuda.is_available():  # each GPU has a thread in any case
        torch.ones(1, requires_grad=True).backward()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sum in one order, whatever the number of cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """Path of a config that trains through three stages in seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Change to a new folder with tiny.yaml, outside of any SLURM job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def tiny(tiny_yaml: Path, tmp_path: Path):
    """A function that builds the tiny config with additional flags."""

    def build(*flags: str) -> mae_et.PretrainConfig:
        given = [f"--output.dir={tmp_path / 'run'}", *flags]
        return mae_et.load_config(mae_et.PretrainConfig, [tiny_yaml], given)

    return build


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Folder of a finished run of the tiny config, which tests only read; see `finished`."""
    return mae_et.pretrain(config_in(tmp_path_factory.mktemp("trained"), IMAGES))


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """Folder of a finished run of the tiny config, which the test may write to."""
    return Path(shutil.copytree(trained, tmp_path / "finished"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A real SLURM with two nodes on the loopback."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM's programs are missing ({', '.join(missing)}): make slurm-deps")
    with start_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def alone_in_a_group():
    """A process group of one, in which DistributedDataParallel runs as among many."""
    import torch.distributed as dist

    def create() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    # Groups are named by a counter, which a failed attempt to join advances and which destroying a
    # group resets. DTensor keeps the meshes of earlier groups and finds their groups by name.
    create()
    dist.destroy_process_group()
    create()
    yield
    dist.destroy_process_group()
