"""`efficiency.decode` takes the GPU where it is faster and right, and says so."""

import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_decoding import (
    ALONE,
    CPU,
    STAGES,
    batches,
    compare,
    cpu_decoder,
    damaged,
    opened,
    write_images,
)
from natural_images import natural
from PIL import Image
from torch import Tensor

from finetune.config import RecipeConfig
from finetune.training.transforms import LabelledTrainDataset
from mae_et import pretrain
from mae_et.config.data import DataConfig
from mae_et.curriculum.schedule import Curriculum
from mae_et.data.batch import Batch
from mae_et.data.datasets import open_dataset
from mae_et.data.device import choose_decoder as choice
from mae_et.data.device import decode_ahead, decoder_trial, self_checks
from mae_et.data.device.box_resize import resize_boxes
from mae_et.data.device.choose_decoder import choose_decoder, decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.decoder_trial import Trial, try_decoder
from mae_et.data.images import jpeg_crop
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import UserError
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.resume.same_data import check_data


@pytest.fixture(autouse=True)
def _decode_whole_images(monkeypatch) -> None:
    """Let crop.method decode read the whole image, as the device does, not a coarser scale."""
    monkeypatch.setattr(jpeg_crop, "coarsest_scale", lambda *_: 1)


@pytest.fixture
def gpu(monkeypatch) -> DistributedContext:
    """Return a rank with a GPU, which is the CPU: its decoder is torchvision's."""
    decode_ahead.notify.cache_clear()
    monkeypatch.setattr(choice, "_find_decoder", lambda *_: (decode_torchvision, "TorchCodec"))
    monkeypatch.setattr(choice, "checked_decode", lambda decode, _: (decode, ""))
    monkeypatch.setattr(choice, "fastest_resize", lambda _: (resize_boxes, ""))
    monkeypatch.setattr(choice, "DeviceDecoder", lambda _, *rest: DeviceDecoder(CPU, *rest))
    return DistributedContext(0, 1, torch.device("cuda"))


def test_auto_and_cpu_decode_in_loader_processes_on_a_cpu(tmp_path: Path, gpu, capsys) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    assert choose_decoder("auto", dataset, ALONE) is None
    assert choose_decoder("cpu", dataset, gpu) is None
    assert not capsys.readouterr().err


def test_a_rank_without_a_choice_joins_the_exchanges_of_the_others(
    tmp_path: Path, gpu, monkeypatch, capsys
) -> None:
    """A node whose memory is too small for `data.cache ram` reads a dataset that is no files."""
    dataset, exchanged = opened(DataConfig(root=write_images(tmp_path))), []
    dataset.source = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setattr(choice, "any_rank", lambda flag, _: exchanged.append(flag) or True)
    assert choose_decoder("auto", dataset, gpu, 16) is None
    assert exchanged == [False, *[True] * len(set(dataset.sides))]
    assert "CPU (efficiency.decode auto): the images are not files" in capsys.readouterr().err


def test_gpu_without_cuda_is_refused_before_anything_is_written(
    tiny, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny(f"--data.root={write_images(tmp_path / 'images')}", "--efficiency.decode=gpu")
    with pytest.raises(UserError, match=r"efficiency\.decode gpu .*: torch sees no CUDA"):
        pretrain(config)
    assert not config.output.dir.exists()


@pytest.mark.parametrize(
    ("data", "channels", "reason"),
    [
        ({"augment": "rand-mstd0.5-inc1"}, 3, "RandAugment (data.augment) runs on the CPU"),
        ({}, 1, "model.channels is 1, not 3"),
    ],
)
def test_what_the_gpu_path_lacks_is_said_and_left_to_the_cpu(
    tmp_path: Path, gpu, capsys, data, channels: int, reason: str
) -> None:
    config = DataConfig(root=write_images(tmp_path), **data)
    source = open_dataset(config, "train", channels)
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 4)
    dataset = TrainDataset(source, config, plan, 8, 0)
    assert choose_decoder("auto", dataset, gpu) is None
    assert reason in capsys.readouterr().err
    with pytest.raises(UserError) as raised:
        choose_decoder("gpu", dataset, gpu)
    assert reason in str(raised.value)


def test_classifiers_decode_on_the_cpu(tmp_path: Path, gpu, capsys) -> None:
    config = DataConfig(root=write_images(tmp_path))
    source = open_dataset(config, "train")
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 4)
    dataset = LabelledTrainDataset(source, config, RecipeConfig(), plan, 0)
    assert choose_decoder("auto", dataset, gpu) is None
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="for pre-training only"):
        choose_decoder("gpu", dataset, gpu)


FASTER, SLOWER = Trial(12_000.0, 4000.0), Trial(9000.0, 4000.0)  # 0.4 of it beside training

WRONG = Trial(9000.0, 4000.0, "the GPU's views differ")


@pytest.mark.parametrize(
    ("requested", "before", "trial", "place", "said"),
    [
        ("auto", None, FASTER, "gpu", "GPU (efficiency.decode auto): TorchCodec 12,000 images/s"),
        ("auto", None, SLOWER, "cpu", "(efficiency.decode auto): the GPU with TorchCodec 9,000"),
        ("auto", None, WRONG, "cpu", "CPU (efficiency.decode auto): the GPU's views differ"),
        ("auto", "gpu", SLOWER, "gpu", "GPU (efficiency.decode auto)"),
        ("auto", "TorchCodec", SLOWER, "gpu", "GPU (efficiency.decode auto)"),
        ("auto", "torchvision", SLOWER, "gpu", "before by torchvision: pixels differ by rounding"),
        ("auto", "gpu", WRONG, "cpu", "views differ; before by the GPU: pixels differ by rounding"),
        ("auto", "cpu", FASTER, "cpu", "): as when the run started; gpu would change it"),
        ("gpu", "cpu", WRONG, "gpu", "TorchCodec; before by the CPU: pixels differ by rounding"),
        ("cpu", "gpu", FASTER, "cpu", "CPU (efficiency.decode cpu): before by the GPU: pixels"),
    ],
)  # fmt: skip
def test_the_faster_decoder_is_taken_if_right_and_a_resumed_run_keeps_it(
    tmp_path: Path, gpu, monkeypatch, capsys, requested: Any, before, trial, place: str, said: str
) -> None:
    """An explicit choice is obeyed; every change is said."""
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    monkeypatch.setattr(choice, "try_decoder", lambda *_: trial)
    decoder = choose_decoder(requested, dataset, gpu, 16, before)
    assert (decoder is not None) is (place == "gpu")
    err = capsys.readouterr().err
    assert said in err
    assert ("pixels differ" in err) is (before not in (None, place, "TorchCodec"))


def test_images_of_each_size_are_decoded_where_that_is_faster(
    tmp_path: Path, gpu, monkeypatch, capsys
) -> None:
    """At 16 px the CPU reads a small scale; a resumed run keeps that, whatever is faster now."""
    dataset = opened(DataConfig(root=write_images(tmp_path)), "decode")
    trials = [SLOWER, FASTER, FASTER]  # by stage
    monkeypatch.setattr(choice, "try_decoder", lambda *given: trials[given[-1]])
    decoder = choose_decoder("auto", dataset, gpu, 16)
    assert decoder is not None
    assert decoder.cpu_sides == (16,)
    said = "decoded by the GPU, at 16 px by the CPU (efficiency.decode auto): TorchCodec 9,000 "
    said += "images/s at 16 px (about 3,600 beside training), 16 loader processes 4,000; 12,000"
    err = capsys.readouterr().err
    assert said in err
    assert "16 loader processes 4,000 (files read before: storage may be slower)" in err
    ours, by_gpu = batches(dataset, decoder), batches(dataset, cpu_decoder(dataset))
    for one, gpus, todays in zip(ours, by_gpu, batches(dataset, None), strict=True):
        expected = todays if one.images.shape[-1] == 16 else gpus
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))
    trials.reverse()
    resumed = choose_decoder("auto", dataset, gpu, 16, "TorchCodec", (16,))
    assert resumed is not None
    assert resumed.cpu_sides == (16,)
    assert "so far" not in capsys.readouterr().err
    asked = choose_decoder("gpu", dataset, gpu, 16, "TorchCodec", (16,))
    assert asked is not None
    assert asked.cpu_sides == ()
    assert "before by TorchCodec, at 16 px by the CPU: pixels" in capsys.readouterr().err


def test_the_gpu_is_taken_on_all_ranks_or_on_none(tmp_path: Path, gpu, monkeypatch, capsys) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    monkeypatch.setattr(choice, "try_decoder", lambda *_: FASTER)
    monkeypatch.setattr(choice, "any_rank", lambda *_: True)  # another rank is slower
    assert choose_decoder("auto", dataset, gpu, 16) is None
    assert "CPU (efficiency.decode auto): on another rank, the GPU" in capsys.readouterr().err


def swapped(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    return [image.flip(0) for image in decode_torchvision(contents, device)]


def shifted(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    return [image.roll(1, -1) for image in decode_torchvision(contents, device)]


def once_black(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    first, *others = decode_torchvision(contents, device)
    return [torch.zeros_like(first), *others]


def failing(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory\nTry ...")


@pytest.mark.parametrize(
    ("decode", "fault"),
    [
        (decode_torchvision, ""),
        (swapped, "the GPU's views differ from the CPU's (PSNR "),
        (shifted, "the GPU's views differ from the CPU's (PSNR "),
        (once_black, "the GPU's views differ from the CPU's (PSNR "),
        (failing, "the GPU's decoder failed (OutOfMemoryError: CUDA out of memory)"),
    ],
)
def test_a_decoder_with_other_pixels_or_errors_is_found_unfit(
    tmp_path: Path, decode, fault: str
) -> None:
    """A broken image among those that are tried counts against nobody."""
    dataset = opened(DataConfig(root=damaged(tmp_path)))
    found = try_decoder(cpu_decoder(dataset, decode), dataset, 2, 2).fault
    assert found.startswith(fault)
    assert bool(found) is bool(fault)


def test_files_other_than_jpegs_are_left_to_the_cpu(tmp_path: Path) -> None:
    write_images(tmp_path)
    for path in (tmp_path / "train").glob("*.jpg"):
        natural(20, 30).save(path.with_suffix(".png"))
        path.unlink()
    dataset = opened(DataConfig(root=tmp_path))
    fault = try_decoder(cpu_decoder(dataset), dataset, 2, 2).fault
    assert fault == "most images are neither in memory nor baseline JPEGs"


@pytest.mark.parametrize(("third", "rate"), [("jpg", 256), ("png", 5 * 10 / 1.2)])
def test_rates_count_loader_processes_and_what_they_decode_in_a_short_trial(
    tmp_path: Path, monkeypatch, third: str, rate: float
) -> None:
    """The CPU makes a view in 0.3 s, so four are tried; the device takes a second for 256."""
    for path in sorted((write_images(tmp_path) / "train").iterdir())[::3]:
        Image.open(path).convert("RGB").save(path.with_suffix(f".{third}"))
        if third == "png":
            path.unlink()
    dataset, now, lock = opened(DataConfig(root=tmp_path)), [0.0], threading.Lock()
    augment = TrainDataset.augment

    def slow(*arguments: Any) -> Batch:
        now[0] += 0.3
        return augment(*arguments)

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        with lock:
            now[0] += 1.0
        return decode_torchvision(contents, device)

    monkeypatch.setattr(TrainDataset, "augment", slow)
    monkeypatch.setattr(decoder_trial.time, "perf_counter", lambda: now[0])
    trial = try_decoder(cpu_decoder(dataset, decode), dataset, 5, 2)
    assert trial.fault == ""
    assert trial.cpu == pytest.approx(5 / 0.3)
    assert trial.device == pytest.approx(rate)
    assert now[0] < 8


def leaking(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Let an image of a batch overwrite a line of the one before, as TorchCodec 0.17 may."""
    images = decode_torchvision(contents, device)
    for before, after in pairwise(images[8:]):
        before[:, -1] = after[:, -1]
    return images


def batches_failing(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    if len(contents) > 1:
        raise RuntimeError("no batches")
    return decode_torchvision(contents, device)


@pytest.mark.parametrize(
    ("decode", "note"),
    [
        (leaking, "; one image at a time, as its batches have wrong pixels"),
        (batches_failing, "; one image at a time, as a batch failed: no batches"),
        (decode_torchvision, ""),
    ],
)
def test_a_decoder_whose_batches_are_wrong_decodes_an_image_at_a_time_and_the_line_says_so(
    tmp_path: Path, gpu, monkeypatch, capsys, decode, note: str
) -> None:
    monkeypatch.setattr(self_checks, "HEIGHT", 16)
    monkeypatch.setattr(choice, "_find_decoder", lambda *_: (decode, "TorchCodec"))
    checked = self_checks.checked_decode
    monkeypatch.setattr(choice, "checked_decode", lambda decode, _: checked(decode, CPU))
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    decoder = choose_decoder("gpu", dataset, gpu)
    assert decoder is not None
    assert (decoder.decode is not decode) is bool(note)
    assert f"(efficiency.decode gpu): TorchCodec{note}\n" in capsys.readouterr().err
    compare(batches(dataset, decoder), batches(dataset, None))


@pytest.mark.parametrize("kernels", [None, SimpleNamespace(resize_boxes=lambda *_: torch.zeros(1))])
def test_products_resize_where_kernels_fail_or_are_wrong_and_the_line_says_so(
    tmp_path: Path, gpu, monkeypatch, capsys, kernels: Any
) -> None:
    monkeypatch.setitem(sys.modules, "mae_et.data.device.box_resize_triton", kernels)
    monkeypatch.setattr(choice, "fastest_resize", lambda _: self_checks.fastest_resize(CPU))
    decoder = choose_decoder("gpu", opened(DataConfig(root=write_images(tmp_path))), gpu)
    assert decoder is not None
    assert decoder.resize is resize_boxes
    said = "; resized without Triton, which is slower: "
    module = "mae_et.data.device.box_resize_triton"
    said += "its pixels are wrong" if kernels else f"import of {module} halted"
    assert said in capsys.readouterr().err
    right = SimpleNamespace(resize_boxes=lambda *views: resize_boxes(*views))
    monkeypatch.setitem(sys.modules, "mae_et.data.device.box_resize_triton", right)
    assert self_checks.fastest_resize(CPU) == (right.resize_boxes, "")


def test_a_library_that_decodes_no_jpeg_on_the_device_is_not_taken_and_says_why(
    monkeypatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("nvJPEG is not\nsupported")

    assert choice._find_decoder(CPU)[0] is not None
    monkeypatch.setattr(choice, "_decode_torchcodec", fails)
    name = "torchvision (TorchCodec: nvJPEG is not supported)"
    assert choice._find_decoder(CPU) == (decode_torchvision, name)
    monkeypatch.setattr(choice, "decode_torchvision", lambda *_: [torch.zeros(3, 8, 8)] * 2)
    decode, reason = choice._find_decoder(CPU)
    assert decode is None
    assert "TorchCodec: nvJPEG is not supported; torchvision: images of [(3, 8, 8)" in reason


def test_a_checkpoint_that_does_not_say_where_it_decoded_did_so_on_the_cpu(tiny, tmp_path) -> None:
    source = opened(DataConfig(root=write_images(tmp_path))).source
    plan, config = {"dataset_size": len(source)}, "data: {root: null}"
    saved = {"origin": {}, "plan": plan, "step": 1, "config": config}
    assert check_data(tiny(), saved, source, ALONE)["decode"] == "cpu"
    assert check_data(tiny(), None, source, ALONE)["decode"] is None
