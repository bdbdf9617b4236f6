"""Available memory, and the peak of a pass."""

from functools import partial

import pytest
import torch
from torch import nn

from mae_et.runtime import host_memory
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.efficiency import memory
from mae_et.training.efficiency.memory import peak_of

WORLD = DistributedContext(0, 1, torch.device("cpu"))


def test_memory_of_a_gpu_is_what_torch_and_the_driver_count(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    counts = {
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
        "memory_allocated": 100, "max_memory_allocated": 350, "memory_reserved": 150,
        "mem_get_info": (1000, 4000),
    }  # fmt: skip
    for name, value in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda _=None, value=value: value)
    assert memory.available_memory(DistributedContext(0, 1, gpu)) == 1000 + 150 - 100
    assert memory._held_by_others(gpu) == 4000 - 1000 - 150
    assert peak_of(lambda: None, gpu) == 350 - 100

    def fail(error: Exception) -> None:
        raise error

    assert peak_of(partial(fail, torch.OutOfMemoryError("CUDA out of memory")), gpu) is None
    with pytest.raises(RuntimeError, match="a bug"):
        peak_of(partial(fail, RuntimeError("a bug")), gpu)


def test_peak_memory_counts_live_tensors_and_repeats_exactly() -> None:
    device = torch.device("cpu")

    def work() -> None:
        one = torch.zeros(1000)
        two = one + 1
        del one
        two.view(10, 100).mul_(2)
        three = torch.empty(500)
        del two, three

    assert peak_of(work, device) == peak_of(work, device) == 8000


def test_a_restart_waits_for_the_memory_of_ended_processes(monkeypatch, capsys) -> None:
    gpu = DistributedContext(0, 1, torch.device("cuda", 0))
    held = iter([3 * memory.OTHERS_BYTES, 2 * memory.OTHERS_BYTES, memory.OTHERS_BYTES])
    monkeypatch.setattr(memory, "_held_by_others", lambda _: next(held))
    monkeypatch.setattr(memory.time, "sleep", lambda _: None)
    assert not memory.wait_for_other_processes(gpu)
    assert capsys.readouterr().err == (
        "mae-et: other processes hold 6.0 GiB of the memory of GPU 0; waiting up to 30 s for them\n"
    )
    monkeypatch.setattr(memory, "_held_by_others", lambda _: 10 * memory.OTHERS_BYTES)
    assert memory.wait_for_other_processes(gpu, seconds=0)
    assert not memory.wait_for_other_processes(WORLD)


def test_fitting_micro_batches_restores_network_and_generators() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    with memory.without_trace(network):
        network(torch.rand(2, 1, 5, 5)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_available_memory_respects_the_control_group(tmp_path, monkeypatch) -> None:
    available = memory.available_memory(WORLD)
    assert 0 < available < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_memory(WORLD) < available
    for name, text in {"max": "9000", "current": "5000", "stat": "a 1\ninactive_file 300"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_memory.left_in_control_groups(tmp_path) == 4300
    limits = {"docker/a:b": (8000, 5000), "docker": (9000, 5000), "other": (10, 10)}  # version 1
    for group, (most, used) in limits.items():
        folder = tmp_path / "memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(str(most))
        (folder / "memory.usage_in_bytes").write_text(str(used))
    groups = tmp_path / "groups"
    groups.write_text("5:cpu,cpuacct:/other\n4:hugetlb,memory:/docker/a:b\n")
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "Path", lambda _: groups)
        assert host_memory.left_in_control_groups(tmp_path) == 3000
    monkeypatch.setattr(host_memory, "Path", lambda _: tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")  # a kernel before 3.14
    assert host_memory.available_host_memory() is None
