import os

import pytest
import torch

from mae_et.data.cores import SET_BY_USER, compute_threads, worker_count
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext

CPU = DistributedContext(0, 1, torch.device("cpu"))
GPU = DistributedContext(0, 1, torch.device("cuda", 0))


@pytest.fixture
def cores(monkeypatch):
    """A function that gives this process a number of cores, and torch as many threads."""

    def give(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
        torch.set_num_threads(count)

    for name in SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    notify.cache_clear()
    yield give
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("count", "alone", "beside_a_gpu", "on_the_cpu"),
    [(1, 1, 1, 1), (3, 3, 3, 1), (8, 8, 8, 2), (64, 16, 16, 16), (128, 16, 16, 16)],
)
def test_workers_default_to_the_cores_of_a_rank_or_a_quarter_where_it_computes_on_them(
    monkeypatch, count: int, alone: int, beside_a_gpu: int, on_the_cpu: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
    found = worker_count(None), worker_count(None, GPU), worker_count(None, CPU)
    assert found == (alone, beside_a_gpu, on_the_cpu)
    assert worker_count(3, CPU) == 3


@pytest.mark.parametrize(("workers", "threads"), [(0, 4), (1, 3), (3, 1), (9, 1)])
def test_threads_are_the_cores_that_loading_leaves(
    cores, capsys, workers: int, threads: int
) -> None:
    cores(4)
    with compute_threads(workers, CPU):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4
    assert (f"{threads} of 4 cores compute" in capsys.readouterr().err) == (threads < 4)


@pytest.mark.parametrize("name", SET_BY_USER)
def test_threads_that_the_user_set_are_kept(cores, monkeypatch, name: str) -> None:
    cores(4)
    with compute_threads(2, GPU):
        assert torch.get_num_threads() == 4
    monkeypatch.setenv(name, "4")
    with compute_threads(2, CPU):
        assert torch.get_num_threads() == 4
    monkeypatch.delenv(name)
    torch.set_num_threads(1)
    with compute_threads(2, CPU):
        assert torch.get_num_threads() == 1
