"""Each rank has a GPU of its own, and its share of the cores."""

import os
from types import SimpleNamespace

import pytest
import torch

from mae_et import UserError
from mae_et.runtime import placement
from mae_et.runtime.distributed import DistributedContext, choose_device
from mae_et.runtime.placement import check_own_gpus, own_cores


@pytest.fixture
def together(monkeypatch):
    """A function that sets what rank 0 gathers from all ranks."""
    return lambda each: monkeypatch.setattr(placement, "all_gather_json", lambda *_: each)


@pytest.mark.parametrize(
    ("gpus", "visible", "local", "expected"),
    [(0, None, 0, "cpu"), (2, None, 1, "cuda:1"), (2, "4,7", 1, "cuda:1"), (1, "7", 3, "cuda:0")],
)
def test_a_local_rank_takes_its_gpu(monkeypatch, gpus, visible, local, expected) -> None:
    """A launcher may expose to each rank only its own."""
    see(monkeypatch, gpus, visible, local)
    assert choose_device() == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")


def see(monkeypatch, gpus: int, visible: str | None, local: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(local))


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    see(monkeypatch, 1, None, 1)
    with pytest.raises(UserError, match="this node has 1 GPU, too few for local rank 1"):
        choose_device()


def test_ranks_on_one_gpu_are_refused_by_its_uuid(monkeypatch, together) -> None:
    """`cuda:0` of two ranks may be two GPUs, and `cuda:0` and `cuda:1` the same one."""
    properties = SimpleNamespace(uuid="GPU-0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    four = DistributedContext(0, 4, torch.device("cuda", 0))
    together(["GPU-0", "GPU-1", "GPU-2", "GPU-3"])
    check_own_gpus(four)
    together(["GPU-0", "GPU-3", "GPU-2", "GPU-3"])
    with pytest.raises(UserError, match=r"^ranks 1 and 3 run on the same GPU \(UUID GPU-3"):
        check_own_gpus(four)
    check_own_gpus(DistributedContext(0, 4, torch.device("cpu")))
    check_own_gpus(DistributedContext(0, 1, torch.device("cuda", 0)))


def bound_to(cores: range, node: int | None = None) -> list[int]:
    return [placement.node_id() if node is None else node, *cores]


@pytest.mark.parametrize(
    ("ranks", "cores"),
    [
        ([bound_to(range(12)), bound_to(range(12, 24))], 12),  # bound by srun
        ([bound_to(range(12)), bound_to(range(12))], 6),  # torchrun, or a container of 12 cores
        ([bound_to(range(12)), bound_to(range(12), node=5)], 12),  # of another machine
        ([bound_to(range(12)), bound_to(range(6, 18))], 9),
        ([bound_to(range(2))] * 5, 1),
    ],
)
def test_cores_are_divided_by_the_ranks_that_share_them(
    monkeypatch, together, ranks: list[list[int]], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(ranks[0][1:]))
    together(ranks)
    assert own_cores(DistributedContext(0, len(ranks), torch.device("cpu"))) == cores


def test_a_process_alone_has_the_cores_that_it_may_run_on(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 2000})
    assert own_cores(DistributedContext(0, 1, torch.device("cpu"))) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert own_cores(DistributedContext(0, 1, torch.device("cpu"))) == os.cpu_count()
