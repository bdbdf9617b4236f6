"""Many GPUs: gradients are exchanged once a step, micro-batches fit, weights may be sharded."""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import CLASSIFIER, run
from small_mae import small
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from finetune.classifier import build as build_classifier_run
from finetune.config import ClassifierConfig
from finetune.model import build_classifier
from finetune.plan import make_plan
from mae_et import RunFailed, UserError, pretrain, pretraining
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.files import load_config
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data import device_decode
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.runtime import host_memory
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.training import build as building
from mae_et.training import memory, micro_batch, reconstructions
from mae_et.training.build import wrap
from mae_et.training.fsdp import (
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
    shard,
)
from mae_et.training.memory import peak_of
from mae_et.training.micro_batch import largest_part
from mae_et.training.plan import make_plan as make_pretraining_plan
from mae_et.training.reconstructions import gather_model
from mae_et.training.run import Run
from mae_et.training.state import TrainState
from mae_et.training.step import update

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
    run = Run(config, PLAN, WORLD, state, network, None, lambda _: 12 // parts)

    def loss_of(number: int):
        seen.append(number)
        return network(torch.ones(2, 3)).mean()

    for _ in range(2):
        update(run, PLAN.stages[0], range(1, parts + 1), loss_of)
    assert exchanged == [parts, parts]


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
    network = wrap(Run(config, PLAN, two, state, model, None, lambda _: micro_batch))
    assert isinstance(network, DistributedDataParallel)
    assert network.static_graph is static
    assert network.gradient_as_bucket_view


# --- micro-batches that fit -----------------------------------------------------------------------


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


@given(st.integers(1, 400), st.integers(0, 100), st.integers(1, 50), st.integers(1, 20_000))
def test_the_largest_micro_batch_that_fits_is_chosen(share, fixed, slope, limit) -> None:
    parts = [size for size in range(1, share + 1) if share % size == 0]
    found = largest_part(lambda size: fixed + slope * size, parts, limit)
    assert found == max((size for size in parts if fixed + slope * size <= limit), default=0)


@given(st.integers(1, 64))
def test_a_smaller_micro_batch_is_chosen_if_memory_still_runs_out(real: int) -> None:
    """Peaks that tell of a tenth of what is needed, and a device that says so."""
    parts = [1, 2, 4, 8, 16, 32, 64]
    found = largest_part(lambda size: size if size <= real else None, parts, 10**9)
    assert found == max(size for size in parts if size <= real)


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


SHORT = ["--curriculum.epochs=2.5", "--output.checkpoint_every=4", "--output.tensorboard=false"]


def auto(tiny, monkeypatch, mebibytes: float, *flags: str):
    """Pre-train with micro-batches that fit in so much memory; return the newest checkpoint."""
    monkeypatch.setattr(micro_batch, "available_memory", lambda world: int(mebibytes * 2**20))
    config = tiny("--efficiency.micro_batch=auto", *SHORT, *flags)
    return newest_checkpoint(pretrain(config) / "checkpoints")


def test_small_memory_gives_small_micro_batches_and_the_same_weights(
    tiny, monkeypatch, tmp_path, capsys
) -> None:
    """Numbers change by rounding only; with room for all, they do not change."""
    expected = newest_checkpoint(pretrain(tiny(*SHORT)) / "checkpoints")
    roomy = auto(tiny, monkeypatch, 4096, f"--output.dir={tmp_path / 'roomy'}")
    assert set(roomy["micro_batch"].values()) == {12}
    for name, weight in expected["model"].items():
        assert torch.equal(roomy["model"][name], weight)
    capsys.readouterr()
    tight = auto(tiny, monkeypatch, 1.235, f"--output.dir={tmp_path / 'tight'}")
    sizes = tight["micro_batch"]
    assert sizes[16] == 12 > sizes[32]
    assert sizes[16] >= sizes[24] >= sizes[32]
    assert all(12 % size == 0 for size in sizes.values())
    said = [line for line in capsys.readouterr().err.splitlines() if "micro-batches that" in line]
    assert len(said) == 1
    for name, weight in expected["model"].items():
        torch.testing.assert_close(tight["model"][name], weight, rtol=1e-4, atol=2e-4)


def test_a_resumed_run_keeps_its_micro_batches(tiny, monkeypatch, tmp_path) -> None:
    """Also where there is more memory by then: it ends with the same weights, bit for bit."""
    folder = tmp_path / "halved"
    whole = auto(tiny, monkeypatch, 1.235, f"--output.dir={folder}", "--output.keep_last=9")
    (folder / "results.json").unlink()
    for path in sorted((folder / "checkpoints").iterdir())[2:]:
        path.unlink()
    halved = auto(tiny, monkeypatch, 4096, f"--output.dir={folder}")
    assert halved["micro_batch"] == whole["micro_batch"]
    for name, weight in whole["model"].items():
        assert torch.equal(halved["model"][name], weight)


def test_micro_batches_of_a_checkpoint_are_lowered_if_they_do_not_fit_now(
    tiny, monkeypatch, tmp_path, capsys
) -> None:
    """A preempted run may resume on a smaller GPU; weights differ by rounding only."""
    folder = tmp_path / "run"
    whole = auto(tiny, monkeypatch, 4096, f"--output.dir={folder}", "--output.keep_last=9")
    (folder / "results.json").unlink()
    for path in sorted((folder / "checkpoints").iterdir())[2:]:
        path.unlink()
    lowered = auto(tiny, monkeypatch, 1.235, f"--output.dir={folder}")
    assert all(lowered["micro_batch"][b] <= size for b, size in whole["micro_batch"].items())
    assert lowered["micro_batch"] != whole["micro_batch"]
    assert "do not fit now: lowered" in capsys.readouterr().err
    for name, weight in whole["model"].items():
        torch.testing.assert_close(lowered["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_kept_micro_batches_are_tried_against_any_memory_and_any_share(tiny, monkeypatch) -> None:
    config = tiny("--efficiency.micro_batch=auto")
    run, _ = pretraining.build(config, make_pretraining_plan(config, 40), WORLD, None)
    attempt = partial(pretraining.dry_pass, run)
    odd = dict.fromkeys((16, 24, 32), 7)  # of another number of ranks: 7 do not divide 12 images
    micro_batch.fit_micro_batch(run, {"micro_batch": odd}, attempt)
    assert (run.micro_batch(32), run.state.micro_batch) == (6, odd)
    large = dict.fromkeys((16, 24, 32), 10**9)
    monkeypatch.setattr(micro_batch, "peak_of", lambda *_: None)  # memory runs out in every pass
    with pytest.raises(RunFailed, match="the smallest micro-batch does not fit"):
        micro_batch.fit_micro_batch(run, {"micro_batch": large}, attempt)
    monkeypatch.undo()
    for mebibytes in (0, -5):
        monkeypatch.setattr(micro_batch, "available_memory", lambda _, m=mebibytes: m * 2**20)
        with pytest.raises(RunFailed, match=r"does not fit in memory \(0\.00 GiB free"):
            micro_batch.fit_micro_batch(run, {"micro_batch": odd}, attempt)


def test_kept_micro_batches_leave_half_the_margin_of_new_ones(tiny, monkeypatch) -> None:
    config = tiny("--efficiency.micro_batch=auto")
    run, _ = pretraining.build(config, make_pretraining_plan(config, 40), WORLD, None)
    attempt, kept = partial(pretraining.dry_pass, run), dict.fromkeys((16, 24, 32), 12)
    with memory.without_trace(run.network):
        most = max(micro_batch._peak(run, attempt, *each) for each in kept.items())
    needed = most + micro_batch.optimizer_bytes(run)
    for available, fits in ((needed, False), (needed / (1 - micro_batch.MARGIN / 2) + 1, True)):
        monkeypatch.setattr(micro_batch, "available_memory", lambda _, m=available: int(m) + 1)
        micro_batch.fit_micro_batch(run, {"micro_batch": kept}, attempt)
        assert (run.state.micro_batch == kept) is fits


def test_a_pass_is_measured_beside_what_loading_holds(tiny, monkeypatch) -> None:
    """On a device other than the CPU, where the next micro-batches are copied or decoded."""
    images, gpu = torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.device("meta")
    ahead = device_decode.AHEAD * images.nbytes
    for requested, device, expected in (
        ("auto", gpu, 2**31 + ahead), ("cpu", gpu, ahead), ("gpu", WORLD.device, 0),
    ):  # fmt: skip
        with device_decode.memory_ahead(requested, images, device) as held:
            assert sum(tensor.nbytes for tensor in held) == expected
    config = tiny()
    run, _ = pretraining.build(config, make_pretraining_plan(config, 40), WORLD, None)
    peaks = []
    for size in (0, 0, 10**7):  # after a first pass, which allocates gradients
        monkeypatch.setattr(
            pretraining, "memory_ahead", lambda *_, n=size: nullcontext(torch.empty(n))
        )
        peaks.append(
            peak_of(lambda: pretraining.dry_pass(run, run.plan.stages[0], 2), WORLD.device)
        )
    assert peaks[2] - peaks[1] == 4 * 10**7


def test_sizes_measured_beside_other_processes_are_not_kept(tiny, monkeypatch) -> None:
    """As after a quick restart: a later start would wrongly take them for all that fits."""
    monkeypatch.setattr(micro_batch, "wait_for_other_processes", lambda _: True)
    monkeypatch.setattr(micro_batch, "available_memory", lambda _: int(1.235 * 2**20))
    config = tiny("--efficiency.micro_batch=auto")
    run, _ = pretraining.build(config, make_pretraining_plan(config, 40), WORLD, None)
    assert run.micro_batch(32) < 12
    assert run.state.micro_batch is None


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
    assert "micro-batches that fit now are not kept" in capsys.readouterr().err
    assert not memory.wait_for_other_processes(WORLD)


def test_fitted_micro_batches_of_batch_norm_classifiers_are_even(tmp_path, monkeypatch) -> None:
    (tmp_path / "tiny.yaml").write_text(CLASSIFIER)
    flags = ["--efficiency.micro_batch=auto", f"--output.dir={tmp_path / 'run'}"]
    flags += ["--curriculum.epochs=1", "--output.evaluate_every=null"]
    config = load_config(ClassifierConfig, [tmp_path / "tiny.yaml"], flags)
    found = []
    for mebibytes in (4096, 75):
        monkeypatch.setattr(micro_batch, "available_memory", lambda _, m=mebibytes: m * 2**20)
        network = build_classifier(config.model, 10)
        network.train()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        plan = make_plan(config, network, 40)
        run = build_classifier_run(config, network, plan, WORLD, None)
        assert all(torch.equal(before[n], tensor) for n, tensor in network.state_dict().items())
        found.append(run.micro_batch(32))
    assert found == [8, 4]


def test_ranks_agree_on_the_smallest_micro_batch(tiny, monkeypatch) -> None:
    config = tiny("--efficiency.micro_batch=auto")
    two = DistributedContext(0, 2, torch.device("cpu"))
    monkeypatch.setattr(dist, "all_reduce", lambda sizes, op: sizes.clamp_(max=3))
    monkeypatch.setattr(building, "check_same_start", lambda *_: None)
    monkeypatch.setattr(building, "wrap", lambda run, static: run.network)
    run, _ = pretraining.build(config, make_pretraining_plan(config, 40), two, None)
    assert run.state.micro_batch == {16: 3, 24: 3, 32: 3}
    assert run.micro_batch(32) == 3
    assert run.accumulation(run.plan.stages[0]) == 2


def test_a_model_that_fits_nowhere_is_refused(tiny, monkeypatch) -> None:
    with pytest.raises(RunFailed, match=r"at bandwidth 16 the smallest micro-batch does not fit"):
        auto(tiny, monkeypatch, 0.01)


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
    monkeypatch.setattr(host_memory, "Path", lambda _: tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")  # a kernel before 3.14
    assert host_memory.available_host_memory() is None


# --- weights in shards ----------------------------------------------------------------------------

SHARDED = "--efficiency.sharding=full"
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
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_sharded_and_unsharded_training_agree_and_resume_from_each_other(
    tmp_path, decoder: str
) -> None:
    """Losses, norms, clipping and files are those of one process, also where the run changes."""
    probe = ["--probe.every=50%", "--probe.max_fraction=1"]
    common = [*FLAGS, *probe, f"--model.decoder_attention={decoder}"]
    for processes, flags in ((1, []), (2, [SHARDED])):
        done = run(tmp_path, processes, *common, "--output.keep_last=9", *flags)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "1", tmp_path / "2")
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
    for folder, processes, flags in ((two, 1, []), (one, 2, [SHARDED])):
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


def test_unsupported_sharding_is_refused(tiny) -> None:
    with pytest.raises(UserError, match="needs transformer blocks"):
        shard(nn.Linear(2, 2), WORLD)


def test_sharding_on_one_rank_is_reported(tiny, capsys) -> None:
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
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    losses, gradients = [], []
    for model in models:
        for _ in range(2):  # accumulated
            with autocast(torch.bfloat16, WORLD.device):
                loss = model(images, 0.75, noise).loss
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


def test_a_sharded_model_is_gathered_on_the_cpu(tiny, monkeypatch) -> None:
    """`meta` stands for a GPU that cannot hold it; auto alone, which tries the whole, needs it."""
    two, seen = DistributedContext(0, 2, torch.device("meta")), []
    monkeypatch.setattr(building, "check_same_start", lambda *_: None)
    monkeypatch.setattr(building, "fit_micro_batch", lambda *_: None)
    device_of = lambda model: next(model.parameters()).device.type  # noqa: E731
    monkeypatch.setattr(building, "shard", lambda model, *_: seen.append(device_of(model)))
    for flags in ([], ["--efficiency.micro_batch=auto"]):
        config = tiny(SHARDED, *flags)
        run, model = pretraining.build(config, make_pretraining_plan(config, 40), two, None)
    assert seen == ["cpu", "meta"]
    whole = {name: torch.ones_like(t, device="cpu") for name, t in model.state_dict().items()}
    monkeypatch.setattr(reconstructions, "full_state_dict", lambda _: whole)
    gathered = gather_model(run, model)
    assert all(torch.equal(gathered.state_dict()[name], t) for name, t in whole.items())
    assert {p.device.type for p in gathered.parameters()} == {"cpu"}
