"""A step on a GPU mixes no devices and waits for no number: checked on fake CUDA tensors.

Fake tensors have a device, a shape and a type, but no numbers. An operator on tensors of two
devices raises, and so does reading a number, for which a GPU would be waited for. Backward passes
need a real GPU: here they only make gradients.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built import build
from ranks import CLASSIFIER
from tiny_run import config_in
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.config import ClassifierConfig
from finetune.training.classifier import Classification
from finetune.training.transforms import LabelledBatch
from mae_et.config.files import load_config
from mae_et.data.batch import black_batch
from mae_et.data.cached_dataset import CachedDataset
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.encoded import FilePlace, PackedBatch
from mae_et.pretraining import Pretraining
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.metrics import MetricsWindow
from mae_et.training.run import Run
from mae_et.training.step import train_step

GPU = DistributedContext(0, 1, torch.device("cuda", 0))
FAKE = FakeTensorMode()  # one for all tests: what is cached for the device belongs to it


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch) -> None:
    """Move modules to a fake GPU that has bf16, and mock backward passes."""
    try:
        with FAKE:
            torch.ones(1, device=GPU.device)[..., None]
    except RuntimeError:  # torch 2.7
        pytest.skip("torch indexes fake CUDA tensors only where there is a driver")

    to = nn.Module.to

    def move(module: nn.Module, device: Any) -> nn.Module:
        if device == "meta":
            return to(module, device)
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        with FAKE:
                            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        trained = isinstance(tensor, nn.Parameter)
                        tensors[name] = (
                            nn.Parameter(moved, tensor.requires_grad) if trained else moved
                        )
        return module

    def backward(loss: Tensor) -> None:
        assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, GPU.device)
        for parameter in models[-1].parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    models: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "to", lambda *given: models.append(move(*given)) or models[-1])
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def check(run: Run, loss: Tensor, norm: Tensor) -> None:
    """Check that everything that a step leaves is on the GPU, and that metrics do not read it."""
    states = [tensor for each in run.state.optimizer.state.values() for tensor in each.values()]
    assert len(states) >= len([p for p in run.state.model.parameters() if p.requires_grad])
    assert {each.device for each in (loss, norm, *states)} == {GPU.device}
    MetricsWindow(GPU.device).add(loss, norm)


@pytest.mark.parametrize(
    "flags",
    [
        ["--efficiency.precision=fp32", "--model.target=hog"],
        ["--efficiency.precision=bf16", "--optim.max_skipped_updates=3", "--crop.method=resize"],
        ["--efficiency.precision=fp16", "--optim.clip_grad=1", "--optim.max_skipped_updates=3"],
        ["--efficiency.gradient_checkpointing=true", "--model.decoder_attention=cross"],
    ],
)
def test_a_step_of_pre_training(tmp_path: Path, flags: list[str]) -> None:
    fixed = ("--efficiency.micro_batch=6", "--efficiency.device=auto", "--model.encoder_depth=1",
             "--efficiency.cuda_graphs=false")  # fmt: skip
    config = config_in(tmp_path, *fixed, *flags)
    task = Pretraining(config)
    run = build(task, GPU)
    plan = run.plan
    with FAKE:
        batch: Any = black_batch(config.model, plan.stages[0], 6)
        batch = batch._replace(stage=[0])  # which the host knows
        check(run, *train_step(run, plan.stages[0], [batch, batch], task.loss))


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe.mixup=0.8", "--recipe.cutmix=1", "--optim.optimizer=lamb"],
        ["--optim.optimizer=lars", "--efficiency.precision=bf16"],
    ],
)
def test_a_step_of_a_classifier(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(CLASSIFIER)
    fixed = (f"--output.dir={tmp_path}", "--efficiency.device=auto")
    config = load_config(ClassifierConfig, [tmp_path / "recipe.yaml"], [*fixed, *flags])
    task = Classification(config)
    run = build(task, GPU)
    with FAKE:
        labels = torch.zeros(8, dtype=torch.int64)
        batch: Any = LabelledBatch(torch.zeros(8, 3, 32, 32), labels, [0])  # type: ignore[arg-type]
        check(run, *train_step(run, run.plan.stages[0], [batch], task.loss))


@pytest.fixture
def pinned(monkeypatch) -> list[Tensor]:
    """Return a list of pinned tensors; only they may be copied without waiting."""
    pinned: list[Tensor] = []
    to = Tensor.to

    def copy(tensor: Tensor, *place: Any, non_blocking: bool = False) -> Tensor:
        assert not non_blocking or any(tensor is each for each in pinned)  # else it may be freed
        return to(tensor, *place, non_blocking=non_blocking)

    monkeypatch.setattr(Tensor, "to", copy)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    return pinned


@pytest.mark.parametrize("in_memory", [False, True])
def test_views_are_made_on_the_gpu(monkeypatch, pinned: list[Tensor], in_memory: bool) -> None:
    """One image is grey, one is decoded already, and one of the files is refused for its size."""
    places = [
        FilePlace(0, 1800, 20, 30, (0, 0, 20, 30), True),
        FilePlace(2, 3000, 50, 20, (0, 1, 50, 19), False),
        FilePlace(3, 4800, 40, 40, (0, 0, 40, 40), False),
    ]

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        shapes = (1, 20, 30), (3, 50, 20), (3, 50, 60)
        return [torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes]

    # Streams are tested in test_decoding_threads.py.
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: None)
    with FAKE:
        content, views = (
            torch.zeros(shape, dtype=torch.uint8) for shape in ((9600,), (1, 3, 24, 24))
        )
        pinned += [content, views]  # as DataLoader does
        number, noise = np.zeros((4, 3), np.int64), np.zeros((4, 9), np.float32)
        files = np.array([[*place[:4], *place.box, place.flip] for place in places])
        packed = PackedBatch(content, files, views, number, noise, number[0], number)
        rows = [torch.zeros(size, dtype=torch.uint8) for size in (1800, 3000, 4800)]
        monkeypatch.setattr(CachedDataset, "rows", lambda *_: rows)
        stored = CachedDataset.__new__(CachedDataset)
        decoded = DeviceDecoder(GPU.device, [24], stored if in_memory else decode)(packed)
    assert decoded.refused == ([] if in_memory else [3])
    assert decoded.batch.images.shape == (4, 3, 24, 24)
    assert decoded.batch.images.device == decoded.batch.noise.device == GPU.device
