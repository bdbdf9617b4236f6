"""Whole runs: killed and resumed, decoded by the GPU, replayed as graphs, and on two ranks."""

import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import main as drive
from natural_images import jpeg, natural
from ranks import CLASSIFIER
from ranks import run as run_ranks
from torch import Tensor, nn

from finetune import ClassifierConfig, classify
from mae_et import load_config, pretrain
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.curriculum.plan import PlannedStage
from mae_et.data.batch import Batch
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime.distributed import DistributedContext
from mae_et.training import loop
from mae_et.training.efficiency.compile import compiler_fault
from mae_et.training.efficiency.cuda_graphs import GraphedPasses
from mae_et.training.efficiency.flat_gradients import FlatGradients
from mae_et.training.run import Run

SPAWN = multiprocessing.get_context("spawn")  # neither CUDA nor autograd's threads survive a fork
QUIET = (
    "--output.tensorboard=false",
    "--output.reconstruct_images=0",
    "--efficiency.compile=false",
    # Fitting waits for other processes, such as tests beside this one, to free the GPU's memory.
    "--efficiency.micro_batch=12",
)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def close(folder: Path, other: Path, tolerance: float) -> None:
    """Compare losses and final weights of two runs."""
    torch.testing.assert_close(losses(folder), losses(other), rtol=tolerance, atol=0)
    found, expected = (newest_checkpoint(place / "checkpoints") for place in (folder, other))
    assert found is not None
    assert expected is not None
    assert found["step"] == expected["step"]
    for name, weight in expected["model"].items():
        difference = (found["model"][name] - weight).float().norm()
        assert difference <= 10 * tolerance * weight.float().norm() + 1e-4, name


def run_with_fault(config: Path, folder: Path, fault: str, *flags: str) -> int | None:
    """Return the exit code of a run in a process of its own."""
    words = ["pretrain", f"--config={config}", f"--output.dir={folder}", *flags]
    process = SPAWN.Process(target=drive, args=(fault, words))
    process.start()
    process.join(180)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail(f"a run with the fault {fault!r} did not end within 180 s")
    return process.exitcode


def test_a_killed_run_resumes_to_the_numbers_of_an_uninterrupted_one(
    tiny_yaml: Path, tmp_path: Path, device: torch.device
) -> None:
    """Bit for bit on a CPU; on a GPU sums of gradients have no fixed order."""
    flags = (*QUIET, f"--efficiency.device={device.type}", "--efficiency.precision=fp32")
    assert run_with_fault(tiny_yaml, tmp_path / "whole", "none", *flags) == 0
    killed = tmp_path / "killed"
    assert run_with_fault(tiny_yaml, killed, "die:step=8", *flags) == -signal.SIGKILL
    assert run_with_fault(tiny_yaml, killed, "none", *flags) == 0
    close(tmp_path / "killed", tmp_path / "whole", 0 if device.type == "cpu" else 1e-3)


@pytest.mark.parametrize("graphs", ["auto", "false"])
def test_a_step_does_not_wait_for_the_gpu(
    tiny, device: torch.device, monkeypatch, graphs: str
) -> None:
    """PyTorch raises where the host would; a bandwidth's first step allocates, or captures."""
    usual, steps = loop.train_step, Counter[int]()

    def train_step(run: Run, stage: PlannedStage, batches: Iterable[Batch], *rest: Any) -> Any:
        loaded = list(batches)
        steps[stage.bandwidth] += 1
        raises = device.type == "cuda" and steps[stage.bandwidth] > 1
        if raises:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return usual(run, stage, loaded, *rest)
        finally:
            if raises:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", train_step)
    given = {"device": device.type, "precision": "bf16", "micro_batch": 6, "cuda_graphs": graphs}
    flags = [f"--efficiency.{name}={value}" for name, value in given.items()]
    pretrain(tiny(*QUIET, *flags, "--optim.clip_grad=1", "--optim.max_skipped_updates=3"))
    assert min(steps.values()) > 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--efficiency.micro_batch=auto"],
        ["--efficiency.num_workers=2"],
        ["--efficiency.num_workers=2", "--data.cache=ram"],
        ["--efficiency.num_workers=2", "--data.replay={16: 2}"],
    ],
    ids=" ".join,
)
def test_bf16_and_gpu_decoding_train_like_the_cpu(
    tiny, tmp_path: Path, device: torch.device, decode: str, flags: list[str]
) -> None:
    """Another rounding of pixels and products, and the same images in the same order."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    for number in range(40):
        content = jpeg(natural(48, 40, number))
        (tmp_path / "images" / "train" / f"{number:02}.jpg").write_bytes(content)
    common = (*QUIET, f"--data.root={tmp_path / 'images'}", "--optim.base_lr=1e-3", *flags)
    faster = (f"--efficiency.device={device.type}", f"--efficiency.decode={decode}",
              "--efficiency.precision=bf16")  # fmt: skip
    ours = pretrain(tiny(*common, *faster, f"--output.dir={tmp_path / 'ours'}"))
    plain = pretrain(tiny(*common, f"--output.dir={tmp_path / 'plain'}"))
    torch.testing.assert_close(losses(ours), losses(plain), rtol=0.005, atol=0)


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["precision=fp32"], 1e-4),
        (["precision=fp32", "micro_batch=4"], 1e-4),
        (["precision=bf16", "micro_batch=12"], 5e-3),
        (["precision=fp16", "micro_batch=6"], 5e-3),
        (["precision=bf16", "micro_batch=6", "compile=true"], 5e-3),
        (["precision=bf16", "attention=short", "compile=true"], 5e-3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("target", ["norm_pix", "hog"])
def test_replayed_runs_train_like_eager_ones(
    tiny,
    tmp_path: Path,
    device: torch.device,
    flags: list[str],
    tolerance: float,
    target: str,
    capfd,
) -> None:  # fmt: skip
    """Accumulated, scaled and compiled, at three bandwidths."""
    if device.type != "cuda":
        pytest.skip("a CPU has no CUDA graphs (tests/training/test_cuda_graphs.py has a fake one)")
    if "compile=true" in flags and (fault := compiler_fault(device)):
        pytest.skip(f"torch.compile fails here: {fault}")
    common = [f"--efficiency.{flag}" for flag in ["device=cuda", *flags]]
    settings = (*QUIET, *common, f"--model.target={target}", "--optim.base_lr=1e-3")
    eager, replayed = (
        pretrain(
            tiny(
                *settings, f"--efficiency.cuda_graphs={graphs}", f"--output.dir={tmp_path / graphs}"
            )
        )
        for graphs in ("false", "true")
    )
    assert "CUDA graphs" in capfd.readouterr().err
    close(replayed, eager, tolerance)


def test_a_pass_that_waits_for_the_gpu_runs_eagerly(device: torch.device) -> None:
    """CUDA refuses to capture it; what follows runs where it did before."""
    if device.type != "cuda":
        pytest.skip("a CPU has no CUDA graphs")
    weight = nn.Parameter(torch.ones(3, device=device))
    batch = Batch(*torch.ones(2, 3, device=device), torch.zeros(3))

    def work(batch: Batch) -> Tensor:
        loss = (weight * batch.images).sum()
        assert loss.item() == 3
        loss.backward()
        return loss.detach()

    passes, stream = GraphedPasses([weight]), torch.cuda.current_stream(device)
    assert passes(work, batch, 0, first=True) == 3
    assert not passes.enabled
    assert torch.cuda.current_stream(device) == stream
    assert torch.rand(1, device=device) < 1  # else the generator is still capturing
    assert passes(work, batch, 0, first=False) == 3
    assert torch.equal(weight.grad, torch.full_like(weight, 2))


def test_replayed_passes_leave_their_gradients_in_the_buffer_that_ranks_exchange(
    device: torch.device,
) -> None:
    """A pass that replaces them, then one that adds to them, in two steps."""
    if device.type != "cuda":
        pytest.skip("a CPU has no CUDA graphs")
    weight, bias = (nn.Parameter(torch.ones(size, device=device)) for size in (3, 5))
    flat = FlatGradients([weight, bias], DistributedContext(0, 2, device))

    def work(batch: Batch) -> Tensor:
        loss = (weight * batch.images).sum() + 2 * bias.sum()
        loss.backward()
        return loss.detach()

    passes = GraphedPasses([weight, bias])
    for step in (1.0, 5.0):
        for number in (1, 2):
            batch = Batch(*torch.full((2, 3), step, device=device), torch.zeros(3))
            passes(work, batch, 0, first=number == 1)
            assert passes.enabled
            assert torch.equal(weight.grad, torch.full_like(weight, step * number))
            assert torch.equal(bias.grad, torch.full_like(bias, 2 * number))
        storages = {p.grad.untyped_storage().data_ptr() for p in (weight, bias)}
        assert storages == {flat.buffer.untyped_storage().data_ptr()}
        weight.grad = bias.grad = None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_classifier_trains_like_one_on_the_cpu(
    tmp_path: Path, device: torch.device, precision: str
) -> None:
    """A ViT with mixing and a moving average of the weights, scored while it trains."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(CLASSIFIER)
    flags = [
        "--model.backbone=vit_tiny_patch16_224", "--recipe.mixup=0.8", "--recipe.cutmix=1",
        "--optim.ema=0.9", "--optim.base_lr=1e-3",
    ]  # fmt: skip

    def run(place: str, *more: str) -> tuple[Path, float]:
        folder = tmp_path / place
        config = load_config(ClassifierConfig, [recipe], [*flags, f"--output.dir={folder}", *more])
        return folder, classify(config)["val_loss"]

    plain, expected = run("plain", "--efficiency.precision=fp32")
    on = f"--efficiency.device={device.type}"
    ours, found = run("ours", on, f"--efficiency.precision={precision}")
    tolerance = 1e-3 if precision == "fp32" else 0.02
    assert found == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(losses(ours), losses(plain), rtol=tolerance, atol=0)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_train_to_the_losses_of_one(
    tmp_path: Path, device: torch.device, sharding: str
) -> None:
    """Over NCCL, a GPU each."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two ranks over NCCL need two GPUs; this machine has one")
    flags = (*QUIET, f"--efficiency.device={device.type}", "--efficiency.precision=fp32",
             f"--efficiency.sharding={sharding}", "--efficiency.micro_batch=6")  # fmt: skip
    for ranks in (1, 2):
        done = run_ranks(tmp_path, ranks, *flags, method="spawn")
        assert done.returncode == 0, done.stderr
    close(tmp_path / "2", tmp_path / "1", 1e-3)
