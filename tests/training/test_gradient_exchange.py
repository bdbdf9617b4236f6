"""DistributedDataParallel exchanges gradients once a step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_et.config.efficiency import EfficiencyConfig
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.runtime.distributed import DistributedContext
from mae_et.training import build as building
from mae_et.training.build import wrap
from mae_et.training.run import Run
from mae_et.training.state import TrainState
from mae_et.training.step import train_step

PLAN = Curriculum((Stage(16, 1), Stage(32, 1)), 32, 16).plan(6, 40, 12)
WORLD = DistributedContext(0, 1, torch.device("cpu"))


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
    optim = SimpleNamespace(clip_grad=None, max_skipped_updates=0)
    config = SimpleNamespace(optim=optim, efficiency=EfficiencyConfig())
    run = Run(config, PLAN, WORLD, state, network, None, dict.fromkeys((16, 32), 12 // parts))

    def loss_of(*given: Any):
        number = given[2]
        seen.append(number)
        return network(torch.ones(2, 3)).mean()

    for _ in range(2):
        train_step(run, PLAN.stages[0], range(1, parts + 1), loss_of)
    assert exchanged == [parts, parts]


def test_a_non_finite_loss_reaches_the_other_ranks_with_the_gradients(alone_in_a_group) -> None:
    """Though its gradients are finite, and without an exchange of its own."""
    model = nn.Linear(3, 1)
    network = DistributedDataParallel(model)
    exchanged: list[Tensor] = []

    def keep(_, bucket):
        exchanged.append(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network.register_comm_hook(None, keep)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    optim = SimpleNamespace(clip_grad=None, max_skipped_updates=1)
    config = SimpleNamespace(optim=optim, efficiency=EfficiencyConfig())
    run = Run(config, PLAN, WORLD, state, network, None, dict.fromkeys((16, 32), 12))
    train_step(run, PLAN.stages[0], [0], lambda *_: network(torch.ones(2, 3)).mean() + torch.inf)
    assert exchanged[0].isnan().all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("micro_batch", "compiled", "static"),
    [(6, False, True), (3, False, False), (6, True, True)],
)
def test_the_graph_is_static_only_where_no_stage_accumulates(
    alone_in_a_group, monkeypatch, micro_batch: int, compiled: bool, static: bool
) -> None:
    """Torch's reducer fails on a static graph whose first backward pass exchanges nothing."""
    monkeypatch.setattr(building, "compile_network", lambda network, *_, **__: network)
    efficiency = EfficiencyConfig(compile=compiled)
    two = DistributedContext(0, 2, torch.device("cpu"))  # its share of 12 images is 6
    config, model = SimpleNamespace(efficiency=efficiency), nn.Linear(3, 1)
    state: Any = None  # not read
    run = Run(config, PLAN, two, state, model, None, dict.fromkeys((16, 32), micro_batch))
    network = wrap(run).network
    assert isinstance(network, DistributedDataParallel)
    assert network.static_graph is static
    assert network.gradient_as_bucket_view
    assert not network.broadcast_buffers  # which would start each forward pass with an exchange
