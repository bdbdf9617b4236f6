"""Collectives with a single rank."""

import socket

import pytest
import torch
from torch import nn

from mae_et.errors import RunFailed
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext, broadcast_buffers


def test_broadcast_with_one_rank_changes_nothing() -> None:
    norm = nn.BatchNorm1d(2)
    broadcast_buffers(norm, DistributedContext(0, 1, torch.device("cpu")))
    assert norm.running_mean.tolist() == [0, 0]


@pytest.fixture
def two_ranks(monkeypatch) -> int:
    """Environment of rank 0 of two, with a free port, and joins that give up after a second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "PATIENCE_MARGIN", 0)
    return port


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_whose_peer_never_joins_reports_the_wait_and_ends(
    two_ranks: int, monkeypatch, capsys, rank: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(distributed, "NOTICE_SECONDS", 0.1)
    sentence = rf"^rank {rank} could not join 2 ranks at 127\.0\.0\.1:{two_ranks}: .*(T|t)imed out"
    with pytest.raises(RunFailed, match=sentence):
        distributed.initialize("cpu", patience=1)
    said = f"mae-et: rank {rank} is waiting for 2 ranks at 127.0.0.1:{two_ranks}\n"
    assert capsys.readouterr().err.startswith(said)


def test_port_in_use_is_reported_at_once(two_ranks: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", two_ranks))
        other.listen()
        with pytest.raises(RunFailed, match=rf"rank 0 could not join .*:{two_ranks}: .*EADDRINUSE"):
            distributed.initialize("cpu", patience=1)
