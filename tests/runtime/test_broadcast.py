"""What the main rank read reaches the others as it is."""

import pytest
import torch
import torch.distributed as dist

from mae_et.runtime.broadcast import broadcast_outline, broadcast_tensors
from mae_et.runtime.distributed import DistributedContext

CPU = torch.device("cpu")
MAIN, OTHER = DistributedContext(0, 2, CPU), DistributedContext(1, 2, CPU)


@pytest.fixture
def wire(monkeypatch) -> list[torch.Tensor]:
    """What the main rank sends; the other one takes it from here."""
    sent: list[torch.Tensor] = []

    def broadcast(tensor: torch.Tensor, _: int) -> None:
        if sent and sending[0] is OTHER:
            tensor.copy_(sent.pop(0))
        else:
            sent.append(tensor.clone())

    monkeypatch.setattr(dist, "broadcast", broadcast)
    return sent


sending = [MAIN]


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
    sending[0] = MAIN
    assert broadcast_outline(content, MAIN) is content
    sent = broadcast_tensors(content, MAIN, CPU)
    assert sent["model"]["weight"] is content["model"]["weight"]
    sending[0] = OTHER
    outline = broadcast_outline(None, OTHER)
    assert outline["model"]["weight"].untyped_storage().nbytes() == 4  # of any size
    found = broadcast_tensors(outline, OTHER, CPU)
    assert not wire
    assert found["optimizer"]["groups"] == content["optimizer"]["groups"]
    assert (found["step"], found["ema"]) == (7, None)
    for name, tensor in content["model"].items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.equal(found["model"][name], tensor)
    assert torch.equal(found["optimizer"]["state"][0]["step"], torch.tensor(4.0))


def test_one_rank_sends_nothing() -> None:
    alone = DistributedContext(0, 1, CPU)
    assert broadcast_outline("x", alone) == broadcast_tensors("x", alone, CPU) == "x"
