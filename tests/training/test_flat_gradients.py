"""Gradients of replayed passes lie in one buffer, which ranks average."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mae_et.runtime.distributed import DistributedContext
from mae_et.training.efficiency.flat_gradients import ALIGNMENT, FlatGradients

CPU = torch.device("cpu")


def test_gradients_are_aligned_views_that_passes_replace_and_add_to(alone_in_a_group) -> None:
    """With the values of separate gradients; those of unused parameters stay None."""
    used, unused = nn.Linear(3, 5), nn.Linear(2, 2)
    parameters = [*used.parameters(), *unused.parameters()]
    flat = FlatGradients(parameters, DistributedContext(0, 2, CPU))
    storage = flat.buffer.untyped_storage()
    inputs = torch.arange(6.0).view(2, 3)
    for _ in range(2):  # steps
        for passes in (1, 2):
            used(inputs).sum().backward()
            assert torch.equal(used.weight.grad, passes * inputs.sum(dim=0).expand(5, 3))
            assert torch.equal(used.bias.grad, torch.full((5,), 2.0 * passes))
        flat.average()  # the other rank's are zero
        assert torch.equal(used.bias.grad, torch.full((5,), 2.0))
        for parameter in used.parameters():
            assert parameter.grad.untyped_storage().data_ptr() == storage.data_ptr()
            assert parameter.grad.storage_offset() * 4 % ALIGNMENT == 0
            assert parameter.grad.is_contiguous()
        assert all(parameter.grad is None for parameter in unused.parameters())
        nn.Sequential(used, unused).zero_grad(set_to_none=True)


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "cpu:nccl"])
def test_nccl_averages_in_the_exchange_itself(monkeypatch, backend: str) -> None:
    exchanged = []
    monkeypatch.setattr(dist, "get_backend_config", lambda: backend)
    monkeypatch.setattr(dist, "all_reduce", lambda *given: exchanged.append(given))
    flat = FlatGradients([nn.Parameter(torch.ones(3))], DistributedContext(0, 4, CPU))
    flat.buffer += 8
    flat.average()
    ((buffer, *operator),) = exchanged
    assert buffer is flat.buffer
    assert operator == ([dist.ReduceOp.AVG] if "cpu:nccl" in backend else [])
    assert set(buffer.tolist()) == ({8.0} if operator else {2.0})


def test_one_rank_has_no_buffer() -> None:
    parameter = nn.Parameter(torch.ones(3))
    flat = FlatGradients([parameter], DistributedContext(0, 1, CPU))
    parameter.sum().backward()
    flat.average()
    assert not hasattr(flat, "buffer")
    assert parameter.grad.untyped_storage().nbytes() == 12
