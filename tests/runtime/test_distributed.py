"""Collectives with a single rank."""

import torch
from torch import nn

from mae_et.runtime.distributed import DistributedContext, broadcast_buffers


def test_broadcast_with_one_rank_changes_nothing() -> None:
    norm = nn.BatchNorm1d(2)
    broadcast_buffers(norm, DistributedContext(0, 1, torch.device("cpu")))
    assert norm.running_mean.tolist() == [0, 0]
