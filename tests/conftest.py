"""What several test files need: a model that fits in a second, and a run that fits in a few."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster, missing_programs, start_cluster
from tiny_run import TINY

from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep sums in one order, whatever the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """Return the path of a config that trains in seconds and passes through three stages."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Return the current folder: a new one with tiny.yaml in it, and on no job of a cluster."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def tiny(tiny_yaml: Path, tmp_path: Path):
    """Return a function that builds the small config with flags on top."""

    def build(*flags: str) -> PretrainConfig:
        return load_config(
            PretrainConfig, [tiny_yaml], [f"--output.dir={tmp_path / 'run'}", *flags]
        )

    return build


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A real SLURM of two nodes on the loopback, with accounting where its programs are."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM's programs are missing ({', '.join(missing)}): make slurm-deps")
    accounting = not missing_programs(accounting=True)
    with start_cluster(tmp_path_factory.mktemp("slurm"), accounting=accounting) as found:
        yield found
