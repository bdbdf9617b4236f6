"""Sharded training (FSDP2) gives the states and numbers of unsharded training."""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from built import build
from ranks import run
from small_mae import small
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_et import UserError, mask_from_noise, pretrain
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.pretraining import Pretraining
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.training import build as building
from mae_et.training import reconstructions
from mae_et.training.efficiency import fsdp
from mae_et.training.efficiency.fsdp import (
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
    ranks_per_node,
    shard,
)
from mae_et.training.reconstructions import gather_model

WORLD = DistributedContext(0, 1, torch.device("cpu"))
SHARDED = "--efficiency.sharding=full"
COPIES_ON_CPU = pytest.mark.skipif(
    torch.__version__ < "2.8", reason="PyTorch 2.7 keeps copies of shards on GPUs only"
)
FLAGS = [
    "--efficiency.micro_batch=3",
    "--efficiency.gradient_checkpointing=true",
    "--optim.clip_grad=0.3",
    "--optim.base_lr=1e-3",
    "--output.log_every=1",
]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, one of them decayed, in another order than the model's."""
    vectors, matrices = ([p for p in model.parameters() if (p.ndim > 1) == w] for w in (0, 1))
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.filterwarnings("error:FSDP2")  # of torch's, without a reason
def test_sharded_state_dicts_equal_unsharded_ones(alone_in_a_group) -> None:
    """One shard of all holds what many do; slow tests have the same of two processes."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), Block(8, 2), nn.Linear(8, 2))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            images = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    whole, sharded = network(), network()
    shard(sharded, WORLD)
    optimizers = [optimizer_of(model) for model in (whole, sharded)]
    before = full_optimizer_state_dict(sharded, optimizers[1])
    assert before == optimizers[0].state_dict()
    assert before["state"] == {}
    load_full_optimizer_state_dict(sharded, optimizers[1], before)
    for model, optimizer in zip((whole, sharded), optimizers, strict=True):
        train(model, optimizer, 3)
    weights, state = full_state_dict(sharded), full_optimizer_state_dict(sharded, optimizers[1])
    expected, expected_state = whole.state_dict(), optimizers[0].state_dict()
    assert list(weights) == list(expected)
    torch.testing.assert_close(weights, expected)
    assert state["param_groups"] == expected_state["param_groups"]
    assert list(state["state"]) == list(expected_state["state"])
    torch.testing.assert_close(state["state"], expected_state["state"])

    # An unsharded state resumes under sharding as it does without.
    expected, expected_state = deepcopy((expected, expected_state))
    again = network()
    shard(again, WORLD)
    optimizer = optimizer_of(again)
    load_full_state_dict(again, expected)
    load_full_optimizer_state_dict(again, optimizer, expected_state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    train(again, optimizer, 2)
    train(whole, optimizers[0], 2)
    torch.testing.assert_close(full_state_dict(again), whole.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "ranks", "sharding"),
    [
        ("self", 2, [SHARDED]),
        ("cross", 2, [SHARDED]),
        pytest.param(
            "self",
            4,
            ["--efficiency.sharding=hybrid", "--efficiency.micro_batch=1"],
            marks=COPIES_ON_CPU,
        ),
    ],
)
def test_sharded_and_unsharded_training_agree_and_resume_from_each_other(
    tmp_path, monkeypatch, decoder: str, ranks: int, sharding: list[str]
) -> None:
    """Losses, norms, clipping and files are those of one process, also where the run changes.

    Hybrid sharding takes the four ranks for two nodes.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    probe = ["--probe.every=50%", "--probe.max_fraction=1"]
    common = [*FLAGS, *probe, f"--model.decoder_attention={decoder}"]
    for processes, flags in ((1, []), (ranks, sharding)):
        done = run(tmp_path, processes, *common, "--output.keep_last=9", *flags)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "1", tmp_path / str(ranks))
    rows = [read_metrics(folder) for folder in (one, two)]
    for key in ("loss", "grad_norm"):
        expected, found = ([row[key] for row in mine] for mine in rows)
        assert found == pytest.approx(expected, rel=1e-5)
    rows = [read_metrics(folder, SCORES) for folder in (one, two)]
    for key in set(rows[0][0]) - {"time", "probe_seconds"}:
        expected, found = ([row[key] for row in mine] for mine in rows)
        assert found == pytest.approx(expected, abs=1e-2), key
    expected, found = (newest_checkpoint(folder / "checkpoints") for folder in (one, two))
    assert_same_states(found, expected)
    names = sorted(path.name for path in one.iterdir() if not path.name.startswith("events"))
    found_names = sorted(path.name for path in two.iterdir() if not path.name.startswith("events"))
    assert found_names == names

    # From the middle on, shards go on in one process, and one process in shards.
    for folder, processes, flags in ((two, 1, []), (one, ranks, sharding)):
        (folder / "results.json").unlink()
        for path in sorted((folder / "checkpoints").iterdir())[2:]:
            path.unlink()
        where = f"--output.dir={folder}"
        done = run(tmp_path, processes, *common, *flags, where)
        assert done.returncode == 0, done.stderr
        assert_same_states(newest_checkpoint(folder / "checkpoints"), expected)


def assert_same_states(found: dict, expected: dict) -> None:
    """Compare two checkpoints' weights and optimizers, to 1e-5, and their layout exactly."""
    assert set(found) == set(expected)
    assert list(found["model"]) == list(expected["model"])
    for name, weight in expected["model"].items():
        torch.testing.assert_close(found["model"][name], weight, rtol=1e-5, atol=1e-5)
    mine, other = found["optimizer"], expected["optimizer"]
    assert mine["param_groups"] == other["param_groups"]
    assert list(mine["state"]) == list(other["state"])
    for number, state in other["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(mine["state"][number][name], tensor, rtol=1e-3, atol=1e-5)


def test_sharding_without_blocks_is_refused_and_on_one_rank_reported(tiny, capsys) -> None:
    with pytest.raises(UserError, match="needs transformer blocks"):
        shard(nn.Linear(2, 2), WORLD)
    notify.cache_clear()
    pretrain(tiny(SHARDED), stop_after_step=1)
    assert "efficiency.sharding full: nothing is sharded on one rank" in capsys.readouterr().err


def test_weights_are_gathered_in_bf16_and_gradients_summed_in_float32(alone_in_a_group) -> None:
    """With the loss and gradients of autocast without sharding, but for those of norms."""
    models = [small() for _ in range(2)]
    shard(models[1], WORLD, torch.bfloat16)
    gathered: list[torch.dtype] = []
    models[1].encoder.blocks[0].attn.qkv.register_forward_pre_hook(
        lambda module, _: gathered.append(module.weight.dtype)
    )
    torch.manual_seed(1)
    images, mask = torch.randn(4, 3, 32, 32), mask_from_noise(torch.rand(4, 16), 0.75)
    losses, gradients = [], []
    for model in models:
        for _ in range(2):  # accumulated
            with autocast(torch.bfloat16, WORLD.device):
                loss = model(images, mask).loss
            loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert set(gathered) == {torch.bfloat16}
    assert torch.equal(losses[1], losses[0])
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert isinstance(found, DTensor)  # stays sharded between micro-batches
        assert found.dtype == torch.float32
        # New norms' weights are 1 and 0, which bf16 holds; their gradients are rounded to it.
        rounding = 1e-2 if ".norm" in name else 0
        difference = (found.full_tensor() - expected).norm()
        assert difference <= rounding * expected.norm(), name


class Collectives(TorchDispatchMode):
    """Count the collectives in the block, by name and type of the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function._opname, tree_leaves(args)[0].dtype] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[8, 64])
def last_of_many(request) -> Iterator[DistributedContext]:
    """The last of many ranks, whose collectives leave their outputs as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    yield DistributedContext(ranks - 1, ranks, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("hybrid", [False, pytest.param(True, marks=COPIES_ON_CPU)])
def test_collectives_of_a_micro_batch_depend_on_the_blocks_only(
    last_of_many, monkeypatch, hybrid: bool
) -> None:
    """Also where a weight has fewer rows than there are ranks; nodes exchange once per step."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(fsdp, "all_ranks_equal", lambda *_: True)
    model: Any = small(encoder_depth=2, decoder_depth=1)
    shard(model, last_of_many, torch.bfloat16, within_nodes=hybrid)
    images, mask = torch.randn(2, 3, 32, 32), mask_from_noise(torch.rand(2, 16), 0.75)
    for last in (False, True):
        model.set_requires_all_reduce(last)
        with Collectives() as found:
            with autocast(torch.bfloat16, last_of_many.device):
                loss = model(images, mask).loss
            loss.backward()
        assert found.counts == {
            ("_allgather_base_", torch.float32): 1,  # outside of blocks
            ("_allgather_base_", torch.bfloat16): 2 * 3,  # forward and backward
            ("_reduce_scatter_base_", torch.float32): 3 + 1,
            **({("allreduce_", torch.float32): 3 + 1} if hybrid and last else {}),
        }


@pytest.mark.parametrize(("here", "equal"), [("3", True), ("4", False)])
def test_nodes_of_different_sizes_are_refused(monkeypatch, here: str, equal: bool) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(fsdp, "all_ranks_equal", lambda *_: equal)
    with pytest.raises(UserError, match=f"on every node; LOCAL_WORLD_SIZE is {here} here, of 8"):
        ranks_per_node(DistributedContext(0, 8, WORLD.device))


def test_a_sharded_model_is_gathered_on_the_cpu(tiny, monkeypatch) -> None:
    """`meta` stands for a GPU that cannot hold it; auto alone, which tries the whole, needs it."""
    two, seen = DistributedContext(0, 2, torch.device("meta")), []
    monkeypatch.setattr(building, "check_same_start", lambda *_: None)
    monkeypatch.setattr(building, "fit_micro_batch", lambda run, *_: run.micro_batch)
    device_of = lambda model: next(model.parameters()).device.type  # noqa: E731
    monkeypatch.setattr(building, "shard", lambda model, *_, **__: seen.append(device_of(model)))
    for flags in ([], ["--efficiency.micro_batch=auto"]):
        config = tiny(SHARDED, *flags)
        run = build(Pretraining(config), two)
    assert seen == ["cpu", "meta"]
    whole = {
        name: torch.ones_like(t, device="cpu") for name, t in run.state.model.state_dict().items()
    }
    monkeypatch.setattr(reconstructions, "full_state_dict", lambda _: whole)
    gathered = gather_model(run)
    assert all(torch.equal(gathered.state_dict()[name], t) for name, t in whole.items())
    assert {p.device.type for p in gathered.parameters()} == {"cpu"}
