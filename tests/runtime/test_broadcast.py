"""What the main rank read reaches the others as it is."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from mae_et.runtime.broadcast import broadcast_outline, broadcast_tensors
from mae_et.runtime.distributed import DistributedContext

CPU = torch.device("cpu")
MAIN, OTHER = DistributedContext(0, 2, CPU), DistributedContext(1, 2, CPU)


@dataclass
class Wire:
    """Tensors on their way from the main rank to the other one."""

    rank: DistributedContext = MAIN
    """The rank that broadcasts next."""
    sent: list[torch.Tensor] = field(default_factory=list)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        assert source == MAIN.rank
        if self.rank is MAIN:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(self.sent.pop(0))


@pytest.fixture
def wire(monkeypatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr(dist, "broadcast", wire.broadcast)
    return wire


def test_a_checkpoint_arrives_bit_for_bit(wire) -> None:
    content = {
        "model": {"weight": torch.randn(3, 2).T, "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(4.0)}},
            "groups": [{"betas": (0.9, 0.95)}],
        },
        "step": 7,
        "ema": None,
    }
    assert broadcast_outline(content, MAIN) is content
    sent = broadcast_tensors(content, MAIN, CPU)
    assert sent["model"]["weight"] is content["model"]["weight"]
    wire.rank = OTHER
    outline = broadcast_outline(None, OTHER)
    assert outline["model"]["weight"].untyped_storage().nbytes() == 4  # of any size
    found = broadcast_tensors(outline, OTHER, CPU)
    assert not wire.sent
    assert found["optimizer"]["groups"] == content["optimizer"]["groups"]
    assert (found["step"], found["ema"]) == (7, None)
    for name, tensor in content["model"].items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.equal(found["model"][name], tensor)
    assert torch.equal(found["optimizer"]["state"][0]["step"], torch.tensor(4.0))


def test_one_rank_sends_nothing() -> None:
    alone = DistributedContext(0, 1, CPU)
    assert broadcast_outline("x", alone) == broadcast_tensors("x", alone, CPU) == "x"
