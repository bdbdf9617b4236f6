"""Copies of a training state: what torch.save writes of them, and the memory they take."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from train_state import state

from mae_et.runtime.distributed import DistributedContext
from mae_et.training import checkpoint_writer, host_copy
from mae_et.training.efficiency.fsdp import shard
from mae_et.training.host_copy import HostCopy
from mae_et.training.state import TrainState


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def awkward() -> dict[str, Any]:
    """Tied weights, views of one storage, an empty tensor, metadata of modules, shared objects."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    base = torch.arange(24.0).view(4, 6)
    views = {"column": base[:, 2], "turned": base.T, "empty": torch.empty(0), "half": base.half()}
    return {
        "model": model.state_dict(), "views": [base, views], "betas": (0.9, 0.95), "step": 3,
        "ema": None, "micro_batch": {16: 4},
    }  # fmt: skip


@pytest.mark.parametrize("make", [awkward, lambda: state(1).to_dict()])
def test_a_copy_is_saved_as_the_state_byte_for_byte(make) -> None:
    content = make()
    assert saved(HostCopy().take(content)) == saved(content)


def test_a_copy_keeps_its_values_and_the_next_one_reuses_its_memory() -> None:
    trained, host = state(1), HostCopy()
    first, before = host.take(trained.to_dict()), saved(trained.to_dict())
    name, weight = next(trained.model.named_parameters())
    address = first["model"][name].data_ptr()
    weight.data += 1
    trained.optimizer.param_groups[0]["lr"] = 7.0
    assert saved(first) == before
    second = host.take(trained.to_dict())
    assert second["model"][name].data_ptr() == address
    assert saved(second) == saved(trained.to_dict())


def test_only_the_named_storages_are_copied() -> None:
    """Those gathered from the shards of a model are new already."""
    own, gathered = torch.ones(2), torch.ones(3)
    copied = HostCopy().take({"own": own, "gathered": gathered}, {own.data_ptr()})
    assert copied["own"].data_ptr() != own.data_ptr()
    assert copied["gathered"].data_ptr() == gathered.data_ptr()


def test_training_changes_nothing_of_the_copy_of_a_sharded_state(alone_in_a_group) -> None:
    """Gathered tensors are new, or copied where they are the run's own, as its step counts are."""
    model = nn.Sequential(nn.Linear(8, 8), Block(8, 2))
    shard(model, DistributedContext(0, 1, torch.device("cpu")))
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        model(torch.ones(2, 3, 8)).square().mean().backward()
        optimizer.step()

    train()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run: Any = SimpleNamespace(state=TrainState(model, optimizer, scaler, 1, sharded=True))
    copied = HostCopy().take(run.state.to_dict(), set(checkpoint_writer._addresses(run)))
    before = saved(copied)
    train()
    assert saved(copied) == before


def test_without_room_for_a_copy_there_is_none_and_one_line(monkeypatch, capsys) -> None:
    host, content = HostCopy(), {"weight": torch.ones(1000)}
    monkeypatch.setattr(host_copy, "available_host_memory", lambda: 7999)
    assert [host.take(content), host.take(content)] == [None, None]
    assert capsys.readouterr().err.count("training waits while checkpoints are written") == 1
    monkeypatch.setattr(host_copy, "available_host_memory", lambda: 8000)
    assert host.take(content) is not None
    monkeypatch.setattr(host_copy, "available_host_memory", lambda: 0)
    assert host.take(content) is not None  # it has the memory


def test_memory_that_the_system_refuses_is_no_room(monkeypatch, capsys) -> None:
    """A limit on addresses (ulimit -v), or on pinned memory."""
    host, huge = HostCopy(), torch.empty(0).untyped_storage()
    monkeypatch.setattr(host_copy, "available_host_memory", lambda: None)
    monkeypatch.setattr(type(huge), "nbytes", lambda _: 2**62)
    assert host.take({"weight": torch.ones(1)}) is None
    assert capsys.readouterr().err.endswith("GB of host memory, which the system refuses\n")
