"""The largest micro-batches that fit in memory are chosen, kept and lowered."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from built import build
from hypothesis import given
from hypothesis import strategies as st
from ranks import CLASSIFIER

from finetune.config import ClassifierConfig
from finetune.training.classifier import Classification
from mae_et import RunFailed, pretrain, pretraining
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.files import load_config
from mae_et.data.device import decode_ahead, memory_ahead
from mae_et.pretraining import Pretraining
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.training import build as building
from mae_et.training.build import build_run
from mae_et.training.efficiency import memory, micro_batch
from mae_et.training.efficiency.cuda_graphs import GraphedPasses
from mae_et.training.efficiency.memory import peak_of
from mae_et.training.efficiency.micro_batch import largest_part
from mae_et.training.run import Run

WORLD = DistributedContext(0, 1, torch.device("cpu"))


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


@pytest.mark.parametrize(("first", "then"), [(1.235, 4096), (4096, 1.235)])
def test_a_resumed_run_keeps_its_micro_batches_or_lowers_those_that_do_not_fit_now(
    tiny, monkeypatch, tmp_path, capsys, first: float, then: float
) -> None:
    """With more memory, its weights are the same bit for bit; on a smaller GPU, up to rounding."""
    folder = tmp_path / "run"
    whole = auto(tiny, monkeypatch, first, f"--output.dir={folder}", "--output.keep_last=9")
    (folder / "results.json").unlink()
    for path in sorted((folder / "checkpoints").iterdir())[2:]:
        path.unlink()
    resumed = auto(tiny, monkeypatch, then, f"--output.dir={folder}")
    assert all(resumed["micro_batch"][b] <= size for b, size in whole["micro_batch"].items())
    lowered = then < first
    assert (resumed["micro_batch"] != whole["micro_batch"]) == lowered
    assert ("do not fit now: lowered" in capsys.readouterr().err) == lowered
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if lowered else {"rtol": 0, "atol": 0}
    for name, weight in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], weight, **tolerance)


def fitted(tiny) -> tuple[Run, micro_batch.Attempt]:
    """Return a run with micro-batches that fit, and its dry pass."""
    task = Pretraining(tiny("--efficiency.micro_batch=auto"))
    run = build(task)
    return run, partial(task.dry_pass, run)


def test_kept_micro_batches_are_tried_against_any_memory_and_any_share(tiny, monkeypatch) -> None:
    run, attempt = fitted(tiny)
    odd = dict.fromkeys((16, 24, 32), 7)  # of another number of ranks: 7 do not divide 12 images
    sizes = micro_batch.fit_micro_batch(run, {"micro_batch": odd}, attempt)
    assert (sizes[32], run.state.micro_batch) == (6, odd)
    large = dict.fromkeys((16, 24, 32), 10**9)
    monkeypatch.setattr(micro_batch, "peak_of", lambda *_: None)  # memory runs out in every pass
    with pytest.raises(RunFailed, match="at bandwidth 16 the smallest micro-batch does not"):
        micro_batch.fit_micro_batch(run, {"micro_batch": large}, attempt)
    monkeypatch.undo()
    for mebibytes in (0, -5):
        monkeypatch.setattr(micro_batch, "available_memory", lambda _, m=mebibytes: m * 2**20)
        with pytest.raises(RunFailed, match=r"does not fit in memory \(0\.00 GiB free"):
            micro_batch.fit_micro_batch(run, {"micro_batch": odd}, attempt)


def test_kept_micro_batches_leave_half_the_margin_of_new_ones(tiny, monkeypatch) -> None:
    run, attempt = fitted(tiny)
    kept = dict.fromkeys((16, 24, 32), 12)
    with memory.without_trace(run.network):
        most = max(micro_batch._peak(run, attempt, *each) for each in kept.items())
    needed = most + micro_batch.optimizer_bytes(run)
    for available, fits in ((needed, False), (needed / (1 - micro_batch.MARGIN / 2) + 1, True)):
        monkeypatch.setattr(micro_batch, "available_memory", lambda _, m=available: int(m) + 1)
        micro_batch.fit_micro_batch(run, {"micro_batch": kept}, attempt)
        assert (run.state.micro_batch == kept) is fits


def test_only_buckets_of_several_ranks_take_memory_beside_the_gradients(tiny) -> None:
    run, _ = fitted(tiny)
    alone = micro_batch.optimizer_bytes(run)
    run = replace(run, world=DistributedContext(0, 2, WORLD.device))
    assert micro_batch.optimizer_bytes(run) == alone / 3 * 4
    run = replace(run, graphs=GraphedPasses(run.trained))
    assert micro_batch.optimizer_bytes(run) == alone


def test_a_pass_is_measured_beside_what_loading_holds(tiny, monkeypatch) -> None:
    """On a device other than the CPU, where the next micro-batches are copied or decoded."""
    images, gpu = torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.device("meta")
    ahead = decode_ahead.AHEAD * images.nbytes
    kept = 5 * images[0].nbytes  # for data.replay
    for requested, device, expected in (
        ("auto", gpu, 2**31 + ahead + kept), ("cpu", gpu, ahead), ("gpu", WORLD.device, 0),
    ):  # fmt: skip
        with memory_ahead.memory_ahead(requested, images, device, 5) as held:
            assert sum(tensor.nbytes for tensor in held) == expected
    task = Pretraining(tiny())
    run = build(task)
    peaks = []
    for size in (0, 0, 10**7):  # after a first pass, which allocates gradients
        monkeypatch.setattr(
            pretraining, "memory_ahead", lambda *_, n=size: nullcontext(torch.empty(n))
        )
        peaks.append(peak_of(lambda: task.dry_pass(run, run.plan.stages[0], 2), WORLD.device))
    assert peaks[2] - peaks[1] == 4 * 10**7


def test_sizes_measured_beside_other_processes_are_not_kept(tiny, monkeypatch, capsys) -> None:
    """As after a quick restart: a later start would wrongly take them for all that fits."""
    monkeypatch.setattr(micro_batch, "wait_for_other_processes", lambda _: True)
    monkeypatch.setattr(micro_batch, "available_memory", lambda _: int(1.235 * 2**20))
    run, _ = fitted(tiny)
    assert run.micro_batch[32] < 12
    assert run.state.micro_batch is None
    assert "micro-batches that fit now are not kept" in capsys.readouterr().err


def test_fitted_micro_batches_of_batch_norm_classifiers_are_even(tmp_path, monkeypatch) -> None:
    (tmp_path / "tiny.yaml").write_text(CLASSIFIER)
    flags = ["--efficiency.micro_batch=auto", f"--output.dir={tmp_path / 'run'}"]
    flags += ["--curriculum.epochs=1", "--output.evaluate_every=null"]
    config = load_config(ClassifierConfig, [tmp_path / "tiny.yaml"], flags)
    found = []
    for mebibytes in (4096, 75):
        monkeypatch.setattr(micro_batch, "available_memory", lambda _, m=mebibytes: m * 2**20)
        task = Classification(config)
        network, _ = task.build_model(None, WORLD)
        network.train()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        run = build_run(task, network, task.make_plan(network, 40), WORLD)
        assert all(torch.equal(before[n], tensor) for n, tensor in network.state_dict().items())
        found.append(run.micro_batch[32])
    assert found == [8, 4]


def test_ranks_agree_on_the_smallest_micro_batch(tiny, monkeypatch) -> None:
    config = tiny("--efficiency.micro_batch=auto")
    two = DistributedContext(0, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed, "any_rank", lambda flag, _: flag)
    monkeypatch.setattr(dist, "all_reduce", lambda sizes, op: sizes.clamp_(max=3))
    monkeypatch.setattr(building, "check_same_start", lambda *_: None)
    monkeypatch.setattr(building, "wrap", lambda run: run)
    run = build(Pretraining(config), two)
    assert run.state.micro_batch == {16: 3, 24: 3, 32: 3}
    assert run.micro_batch[32] == 3
    assert run.accumulation(run.plan.stages[0]) == 2
