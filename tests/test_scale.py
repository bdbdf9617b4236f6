"""Many GPUs: gradients are exchanged once a step, micro-batches fit, weights may be sharded."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_et.checkpoint import TrainState
from mae_et.config import EfficiencyConfig
from mae_et.curriculum import Curriculum, Stage
from mae_et.distributed import World
from mae_et.run import Run, wrap
from mae_et.step import update

PLAN = Curriculum((Stage(16, 1), Stage(32, 1)), 32, 16).plan(6, 40, 12)
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture
def alone_in_a_group():
    """A process group of one, in which DistributedDataParallel runs as among many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_are_exchanged_with_the_last_micro_batch_of_a_step_only(
    alone_in_a_group, parts: int
) -> None:
    model = nn.Linear(3, 1)
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    exchanged: list[int] = []
    seen: list[int] = []

    def count(_, bucket):
        exchanged.append(seen[-1])
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    config = SimpleNamespace(optim=SimpleNamespace(clip_grad=None))
    run = Run(config, PLAN, WORLD, state, network, None, lambda _: 12 // parts)

    def loss_of(number: int):
        seen.append(number)
        return network(torch.ones(2, 3)).mean()

    for _ in range(2):
        update(run, PLAN.stages[0], range(1, parts + 1), loss_of)
    assert exchanged == [parts, parts]


@pytest.mark.parametrize(
    ("micro_batch", "compiled", "static"),
    [(6, False, True), (3, False, False), (6, True, False)],
)
def test_the_graph_is_static_only_where_no_stage_accumulates(
    alone_in_a_group, monkeypatch, micro_batch: int, compiled: bool, static: bool
) -> None:
    """Torch's reducer fails on a static graph whose first backward pass exchanges nothing."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # takes seconds
    efficiency = EfficiencyConfig(compile=compiled)
    two = World(0, 2, torch.device("cpu"))  # its share of 12 images is 6
    network = wrap(nn.Linear(3, 1), efficiency, PLAN, two, lambda _: micro_batch)
    assert isinstance(network, DistributedDataParallel)
    assert network.static_graph is static
    assert network.gradient_as_bucket_view
