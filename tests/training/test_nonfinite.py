"""Non-finite numbers: reported with their step, skipped up to a limit, never saved."""

import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import signal_at, train_with
from torch import nn

from finetune import ClassifierConfig
from finetune.config import ClassifierOptimConfig, NetworkConfig
from mae_et import Interrupted, RunFailed, UserError, pretrain
from mae_et.checkpoints.store import list_checkpoints, load_checkpoint, newest_checkpoint
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.curriculum.schedule import Curriculum
from mae_et.errors import Diverged
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime.distributed import DistributedContext
from mae_et.training import metrics
from mae_et.training.nonfinite import SCALER_PATIENCE, NonFinite, check_state
from mae_et.training.run import Run
from mae_et.training.state import TrainState
from mae_et.training.step import train_step

CPU = torch.device("cpu")


def poisoned(*steps: int):
    """Return a training step that multiplies the images of some steps, counted from 1."""

    def step(run, *rest):
        if run.state.step + 1 not in steps:
            return train_step(run, *rest)
        hook = run.network.register_forward_pre_hook(lambda _, a: (a[0] * math.nan, *a[1:]))
        result = train_step(run, *rest)
        hook.remove()
        return result

    return step


def weights_at(folder, step: int) -> dict:
    return load_checkpoint(folder / "checkpoints" / f"step-{step:08d}.pt")


def test_the_error_names_the_step_and_keeps_the_checkpoint_before_it(tiny) -> None:
    """Also where a row is far behind: at step 9 of rows at 2, 4, 5, 6, 8 and 10."""
    with pytest.raises(Diverged, match=r"^the loss became nan at step 9; the last good checkpoint"):
        train_with(poisoned(9), tiny())
    saved = newest_checkpoint(tiny().output.dir / "checkpoints")
    assert saved["step"] == 5
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    assert not (tiny().output.dir / "results.json").exists()


def test_a_non_finite_gradient_between_log_steps_is_reported_at_its_step(tiny) -> None:
    """Though the loss and the row's last gradient are finite: the next loss would not be."""

    def step(run, *rest):
        loss, norm = train_step(run, *rest)
        return loss, norm * math.inf if run.state.step == 1 else norm

    with pytest.raises(Diverged, match=r"gradient's norm became inf at step 2"):
        train_with(step, tiny("--output.log_every=5", "--optim.max_skipped_updates=0"))


@pytest.mark.parametrize(
    ("precision", "clip"), [("fp32", ["--optim.clip_grad=0.5"]), ("bf16", []), ("fp16", [])]
)
def test_a_skipped_update_leaves_weights_and_moments_unchanged(
    tiny, precision: str, clip: list[str]
) -> None:
    """Bit for bit, Adam's step count included; the run continues and reports the number skipped."""
    config = tiny(
        "--optim.max_skipped_updates=1", "--output.checkpoint_every=1", "--output.keep_last=30",
        "--output.log_every=1", f"--efficiency.precision={precision}", *clip,
        "--curriculum.epochs=1.2",
    )  # fmt: skip
    folder = train_with(poisoned(3), config)
    rows, results = read_metrics(folder), json.loads((folder / "results.json").read_text())
    assert [row["skipped_updates"] for row in rows] == [int(row["step"] == 3) for row in rows]
    assert results["skipped_updates"] == 1
    assert rows[2]["loss"] is rows[2]["grad_norm"] is None
    assert all(math.isfinite(row["loss"]) for row in rows if row["step"] != 3)
    before, after, later = (weights_at(folder, step) for step in (2, 3, 4))
    for name, weight in before["model"].items():
        assert torch.equal(after["model"][name], weight)
    assert any(not torch.equal(later["model"][n], w) for n, w in before["model"].items())
    for number, moments in before["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert torch.equal(after["optimizer"]["state"][number][name], moment)
            assert name != "step" or later["optimizer"]["state"][number][name] == moment + 1


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_loss_over_a_finite_gradient_skips_the_update(
    fp16: bool, value: float
) -> None:
    model = torch.nn.Linear(3, 1)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=fp16))
    optim = SimpleNamespace(clip_grad=1.0, max_skipped_updates=1)
    config = SimpleNamespace(optim=optim, efficiency=EfficiencyConfig())
    plan = Curriculum.preset("constant", 32, 8).plan(1, 12, 12)
    run = Run(config, plan, DistributedContext(0, 1, CPU), state, model, None, {32: 12})
    for lost in (True, False):
        loss, norm = train_step(
            run, plan.stages[0], [0], lambda *_, lost=lost: model(torch.ones(2, 3)).sum()
            + (value if lost else 0.0)
        )  # fmt: skip
        assert loss.isfinite().item() is norm.isfinite().item() is not lost
        assert all(map(torch.equal, model.parameters(), before)) is lost


def test_more_skipped_updates_in_a_row_than_allowed_stop_the_run(tiny) -> None:
    """Two and two with one between are borne with a bound of two; three are not."""
    config = tiny("--optim.max_skipped_updates=2")
    with pytest.raises(Diverged, match=r"the loss became nan .*for 3 updates in a row"):
        train_with(poisoned(2, 3, 5, 6, 8, 9, 10), config)
    assert [row["skipped_updates"] for row in read_metrics(config.output.dir)] == [1, 1, 1, 1, 1]
    saved = newest_checkpoint(config.output.dir / "checkpoints")
    assert saved["step"] == 5
    assert all(weight.isfinite().all() for weight in saved["model"].values())


@pytest.mark.slow
def test_max_skipped_updates_changes_nothing_in_a_finite_run(tiny) -> None:
    base = str(tiny().output.dir)
    plain = pretrain(tiny(f"--output.dir={base}-plain"))
    ready = pretrain(tiny("--optim.max_skipped_updates=5"))
    names = ["loss", "grad_norm"]
    found = [[[row[n] for n in names] for row in read_metrics(f)] for f in (plain, ready)]
    assert found[0] == found[1]
    files = [(f / "encoder.safetensors").read_bytes() for f in (plain, ready)]
    assert files[0] == files[1]


def test_non_finite_weights_after_a_finite_gradient_are_not_saved(tiny) -> None:
    """A learning rate out of all measure: the step that ends a row ruins the weights itself."""

    def ruined(run, *rest):
        result = train_step(run, *rest)
        if run.state.step == 9:
            with torch.no_grad():
                next(run.state.model.parameters()).view(-1)[0] = math.inf
        return result

    config = tiny()
    with pytest.raises(Diverged, match=r"is not finite after step 10; it is not saved"):
        train_with(ruined, config)
    folder = config.output.dir / "checkpoints"
    assert [path.name[-6:-3] for path in list_checkpoints(folder)] == ["005"]


def test_finite_weights_whose_sum_overflows_may_be_saved() -> None:
    state = SimpleNamespace(
        model=nn.Linear(2, 2), ema=None, step=1, optimizer=SimpleNamespace(state={})
    )
    config = SimpleNamespace(output=SimpleNamespace(dir="run"))
    run: Any = SimpleNamespace(state=state, world=DistributedContext(0, 1, CPU), config=config)
    nn.init.constant_(state.model.weight, 3e38)
    check_state(run)
    nn.init.constant_(state.model.bias, -math.inf)
    with pytest.raises(Diverged, match=r"^bias is not finite after step 1"):
        check_state(run)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from([1.0, math.nan, math.inf]), min_size=9, max_size=9),
             min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=2, max_size=2),
)  # fmt: skip
def test_counts_of_windows_equal_a_count_of_the_whole(ranks, cuts) -> None:
    """Over windows of any length and any number of processes."""
    counter = NonFinite()
    edges = [0, cuts[0], cuts[0] + cuts[1], 9]
    for start, end in itertools.pairwise(edges):
        _, (found,) = counter.count(torch.tensor(ranks)[:, start:end, None])
        bad = [[not math.isfinite(v) for v in values] for values in ranks]
        assert found.steps == max(sum(b[start:end]) for b in bad)
        firsts = [i - start + 1 for i in range(start, end) if any(b[i] for b in bad)]
        assert found.first == (firsts[0] if firsts else 0)
        if firsts:
            assert not math.isfinite(found.value)
        longest = max(_longest(b[:end], start) for b in bad)
        assert found.longest == longest


def _longest(bad: list[bool], start: int) -> int:
    """Return the longest row that reaches into what lies from `start` on, or up to it."""
    best = run = 0
    for place, lost in enumerate(bad):
        run = run + 1 if lost else 0
        if place >= start - 1:
            best = max(best, run)
    return best


# --- fp16 -----------------------------------------------------------------------------------------


@pytest.fixture
def restless_scaler(monkeypatch):
    """Have the scaler begin too high, and try a higher scale after every three steps."""
    scaler = torch.amp.GradScaler

    def made(device, enabled):
        return scaler(device, init_scale=2.0**40, growth_interval=3, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", made)


def test_a_resumed_fp16_run_finds_the_same_scale(tiny, restless_scaler) -> None:
    """Stopped in the search, between two trials: weights, scale and its age are the same."""
    base = str(tiny().output.dir)
    flags = ["--efficiency.precision=fp16", "--output.log_every=1"]
    whole = pretrain(tiny(f"--output.dir={base}-whole", *flags))
    skipped_updates = [row["skipped_updates"] for row in read_metrics(whole)]
    assert skipped_updates[:10] == [1] * 10
    assert 0 < sum(skipped_updates[20:]) < 5
    for stop in (7, 23):
        with pytest.raises(Interrupted):
            train_with(signal_at(stop - 1), tiny(*flags))
        saved = newest_checkpoint(tiny().output.dir / "checkpoints")
        assert saved["step"] == stop
        assert saved["scaler"]["scale"] < 2.0**40
    parts = pretrain(tiny(*flags))
    first, second = (newest_checkpoint(folder / "checkpoints") for folder in (whole, parts))
    assert first["scaler"] == second["scaler"]
    assert all(torch.equal(second["model"][name], w) for name, w in first["model"].items())
    assert [row["skipped_updates"] for row in read_metrics(parts)] == skipped_updates


def test_a_scaler_that_finds_no_scale_stops_the_run(tiny) -> None:
    """It would halve its scale and leave out updates to the end, with a finite loss."""
    assert 2.0**16 / 2**SCALER_PATIENCE < 2.0**-24  # less than fp16's smallest number

    def overflowing(run, *rest):
        loss, norm = train_step(run, *rest)
        return loss, norm * math.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "SCALER_PATIENCE", 12)
        with pytest.raises(Diverged, match=r"gradient's norm became inf.*13 updates in a row"):
            train_with(overflowing, tiny("--efficiency.precision=fp16", "--output.log_every=1"))


def test_an_overflowing_learning_rate_is_one_error_sentence(tiny) -> None:
    with pytest.raises(RunFailed, match=r"(became|is not) (nan|inf|finite).*last good checkpoint"):
        pretrain(tiny("--optim.base_lr=1e36", "--optim.warmup_fraction=0"))
    for path in list_checkpoints(tiny().output.dir / "checkpoints"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["model"].values())


def test_negative_max_skipped_updates_is_refused() -> None:
    network = NetworkConfig(backbone="resnet10t")
    with pytest.raises(UserError, match=r"optim\.max_skipped_updates needs optim\.optimizer adamw"):
        ClassifierConfig(
            network, optim=ClassifierOptimConfig(optimizer="lars", max_skipped_updates=1)
        )
    with pytest.raises(UserError, match=r"optim\.max_skipped_updates must not be negative"):
        ClassifierOptimConfig(max_skipped_updates=-1)
