"""Two ranks over gloo match one rank with the same global batch."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from ranks import CLASSIFIER, run, start
from tiny_run import TINY

from finetune import EvaluateConfig, evaluate
from mae_et import UserError
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.data.bad_images import RECORD
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.runtime import distributed


def test_two_ranks_train_to_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        flags = ["--efficiency.micro_batch=3", "--output.log_every=1", "--probe.every=100%"]
        done = run(tmp_path, ranks, *flags, "--probe.max_fraction=1")
        assert done.returncode == 0, done.stderr
    one, two = ([row["loss"] for row in read_metrics(tmp_path / str(ranks))] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    one, two = (read_metrics(tmp_path / str(ranks), SCORES) for ranks in (1, 2))
    for before, after in zip(one, two, strict=True):
        for key in set(before) - {"time", "probe_seconds"}:
            assert after[key] == pytest.approx(before[key], abs=1e-2), key
    one, two = (newest_checkpoint(tmp_path / str(p) / "checkpoints") for p in (1, 2))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=2e-4)


def test_interrupted_ranks_resume_to_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Both ranks receive the signal, with their loader processes, and save one state.

    The interrupted ranks read their images from one cache in memory, the others from the dataset.
    """
    flags = ["--curriculum.epochs=9", "--efficiency.num_workers=1", "--output.log_every=1"]
    whole = run(tmp_path, 2, *flags, f"--output.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert len(whole.stdout.strip().splitlines()) == 1
    flags.append("--data.cache=ram")
    ranks = start(tmp_path, 2, *flags)
    ranks.wait_for("step 3/")
    ranks.signal(signal.SIGTERM)
    stopped = ranks.finish()
    assert stopped.returncode == 128 + signal.SIGTERM
    said = stopped.stderr
    assert "Traceback" not in said
    saved = newest_checkpoint(tmp_path / "2" / "checkpoints")
    assert f"stopped by SIGTERM after step {saved['step']}" in said
    assert said.count("data.cache ram") == said.count("data.cache ram: 40 images decoded to") == 1
    assert not (tmp_path / "2" / "results.json").exists()
    assert run(tmp_path, 2, *flags).returncode == 0
    encoders = [(tmp_path / r / "encoder.safetensors").read_bytes() for r in ("whole", "2")]
    assert encoders[0] == encoders[1]


def test_ranks_score_the_classifier_that_they_save(tmp_path: Path) -> None:
    """An odd number of validation images, each counted once. What is said is said once."""
    results = []
    network = timm.create_model("resnet10t", num_classes=0).state_dict()
    weights = network | {"projector.weight": torch.ones(1)}
    torch.save({"model": weights, "model_ema": weights}, tmp_path / "start.pth")
    for ranks in (1, 2):
        flags = ["--curriculum.epochs=1", "--data.name=synthetic"]
        flags += [f"--model.checkpoint={tmp_path / 'start.pth'}"]
        done = run(tmp_path, ranks, *flags, command="finetune", yaml=CLASSIFIER)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "start.pth" in line]
        assert len(set(said)) == len(said) == 3  # moving average, projection, statistics
        results.append(json.loads(done.stdout))
        folder = tmp_path / str(ranks)
        found = evaluate(EvaluateConfig(folder, device="cpu", num_workers=0))
        # Each rank has its own batch-norm statistics; the scores are of the saved ones.
        assert found["val_loss"] == pytest.approx(results[-1]["val_loss"], abs=1e-4)
        assert found["val_images"] == results[-1]["val_images"] == 31


@pytest.mark.parametrize(
    ("yaml", "command", "flag", "what"),
    [
        (TINY, "pretrain", "--optim.base_lr=0.03", "optim.base_lr is 0.03 there and 0.02"),
        (TINY, "pretrain", "--output.checkpoint_every=4", "output.checkpoint_every is 4 there"),
        (TINY, "pretrain", "--data.root=ROOT/other", "the digest of their names is"),
        (TINY, "pretrain", "--data.root=ROOT/absent", "failed: "),
        (CLASSIFIER, "supervised", "--recipe.mixup=0.5", "recipe.mixup is 0.5 there"),
    ],
)
def test_ranks_that_differ_end_with_one_sentence_on_each(
    tmp_path: Path, yaml: str, command: str, flag: str, what: str
) -> None:
    flags = []
    if "ROOT" in flag:
        for name, first in (("same", 0), ("other", 1)):
            folder = tmp_path / name / "train"
            folder.mkdir(parents=True)
            for number in range(first, first + 40):
                (folder / f"{number:02d}.png").touch()
        flags = ["--data.name=folder", f"--data.root={tmp_path / 'same'}"]
    more = [flag.replace("ROOT", str(tmp_path))]
    done = run(tmp_path, 2, *flags, command=command, yaml=yaml, of_last=more)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "rank 1 (on " in line]
    assert all(what in line for line in lines)
    assert len(lines) == (1 if "absent" in flag else 2)  # the rank that failed names no rank
    assert not (tmp_path / "2").exists()


def test_collectives_with_one_rank_return_their_input() -> None:
    world = distributed.initialize("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert distributed.any_rank(True, world)
    assert not distributed.any_rank(False, world)
    assert distributed.all_ranks_equal(7, world)
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.all_gather(values, world), values[None])
    assert torch.equal(distributed.all_gather_rows(values, world), values)
    distributed.barrier(world)
    distributed.shutdown(world)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_without_a_device() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        distributed.choose_device("cuda")


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder of arrays: two unreadable, one with values that overflow float32."""
    root = tmp_path / "data" / "train"
    root.mkdir(parents=True)
    for number in range(40):
        values = np.random.default_rng(number).random((32, 32, 3), np.float32)
        np.save(root / f"{number:02d}.npy", values * (1e30 if number == 11 else 1))
    for number in (5, 30):
        (root / f"{number:02d}.npy").write_bytes(b"")
    return root.parent


@pytest.mark.slow
def test_ranks_skip_the_same_updates_and_report_the_same_images(
    tmp_path: Path, spoilt: Path
) -> None:
    """Each rank sees half of the data: only one meets the NaN, only one the unreadable file."""
    flags = [f"--data.root={spoilt}", "--data.max_bad_fraction=0.05",
             "--optim.max_skipped_updates=2", "--output.log_every=1"]  # fmt: skip
    keys = ("step", "skipped_updates", "substituted", "unreadable")
    found, records = [], []
    for ranks in (1, 2):
        done = run(tmp_path, ranks, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("another image replaces it") == 2
        rows = read_metrics(tmp_path / str(ranks))
        found.append([[row[key] for key in keys] for row in rows])
        record = read_metrics(tmp_path / str(ranks), RECORD)
        records.append({(row["step"], row["sample"]) for row in record})
        weights = newest_checkpoint(tmp_path / str(ranks) / "checkpoints")["model"]
        assert all(weight.isfinite().all() for weight in weights.values())
    assert found[0] == found[1]
    assert sum(skipped_updates for _, skipped_updates, *_ in found[0]) > 3
    assert records[0] == records[1]
    few = run(tmp_path, 2, *flags, "--data.max_bad_fraction=0", f"--output.dir={tmp_path / 'few'}")
    assert few.returncode == 1
    assert "1 of 40 images cannot be read, more than data.max_bad_fraction 0 allows" in few.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--efficiency.sharding=full", "--efficiency.precision=fp16"])
def test_updates_are_skipped_under_sharding_and_fp16(
    tmp_path: Path, spoilt: Path, flag: str
) -> None:
    flags = [f"--data.root={spoilt}", "--data.max_bad_fraction=0.05",
             "--optim.max_skipped_updates=2", "--output.log_every=1"]  # fmt: skip
    done = run(tmp_path, 2, *flags, flag)
    assert done.returncode == 0, done.stderr
    assert sum(row["skipped_updates"] for row in read_metrics(tmp_path / "2")) > 3
    weights = newest_checkpoint(tmp_path / "2" / "checkpoints")["model"]
    assert all(weight.isfinite().all() for weight in weights.values())
