"""The preview of a run shows what is trained on."""

import random

import numpy as np
import pytest
import torch
from steps import train_with
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import IMAGES
from torchvision.io import read_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from mae_et import pretrain
from mae_et.cli.main import main
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.data.datasets import open_dataset
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.sampler import SampleIndex
from mae_et.data.train_dataset import TrainDataset
from mae_et.data.transforms import as_tensor, normalise
from mae_et.errors import Unreadable, UserError
from mae_et.models.masking import mask_from_noise
from mae_et.runtime.console import notify
from mae_et.training.plan import make_plan
from mae_et.training.preview import draw_preview, preview, training_views
from mae_et.training.step import train_step


def dataset_of(config) -> tuple:
    source = open_dataset(config.data, "train", 3)
    plan = make_plan(config, len(source))
    return plan, TrainDataset.from_config(config, source, plan)


def test_the_views_are_those_that_the_run_trains_on(tiny, tmp_path) -> None:
    config = tiny(IMAGES, "--curriculum.epochs=2", "--efficiency.micro_batch=3")
    first = {}

    def step(run, stage, batches, loss_of):
        batches = list(batches)
        first.setdefault(stage.bandwidth, batches[0])
        return train_step(run, stage, batches, loss_of)

    folder = train_with(step, config, stop_after_step=1)
    path = folder / "preview.png"
    written = path.stat().st_mtime_ns
    train_with(step, config)
    assert path.stat().st_mtime_ns == written
    plan, dataset = dataset_of(config)
    views = list(training_views(config, plan, dataset))
    assert [view.stage.bandwidth for view in views] == [16, 16, 24, 24, 32, 32]
    for place, view in enumerate(views):
        batch, mine = first[view.stage.bandwidth], slice(place % 2, place % 2 + 1)
        images = low_frequency_crop(batch.images[mine], view.stage.bandwidth)
        assert torch.equal(view.images, normalise(images, config.data.mean, config.data.std))
        assert torch.equal(view.hidden, mask_from_noise(batch.noise[mine], 0.75).hidden[0])
    shown = read_image(str(path))
    assert torch.equal(shown, draw_preview(config, plan, dataset))
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("preview")] == [0]
    assert main(["preview", str(folder), f"--save={tmp_path / 'again.png'}"]) == 0
    assert torch.equal(shown, read_image(str(tmp_path / "again.png")))


@pytest.mark.parametrize("method", ["fourier", "decode"])
def test_the_box_is_what_the_crop_is_resized_from(tiny, method) -> None:
    _, dataset = dataset_of(tiny(f"--crop.method={method}"))
    for sample in range(5):
        index = SampleIndex(sample, 1, 1)
        image = as_tensor(dataset.source[sample][0])
        box, flipped, _ = dataset.draw_view(index, *image.shape[-2:])
        size = [dataset.sides[1]] * 2
        crop = resized_crop(image, *map(int, box), size, InterpolationMode.BICUBIC, antialias=True)
        found = dataset[index].images.int()
        assert (found - (crop.flip(-1) if flipped else crop).int()).abs().max() <= 1


def test_drawing_leaves_the_random_generators_as_they_are(tiny) -> None:
    config = tiny()
    plan, dataset = dataset_of(config)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    draw_preview(config, plan, dataset)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_run_without_images_draws_none(tiny) -> None:
    folder = pretrain(tiny(), stop_after_step=1)
    assert not (folder / "preview.png").exists()


def test_a_folder_smaller_than_the_batch_is_drawn_and_the_line_says_so(
    tiny, tmp_path, capsys
) -> None:
    notify.cache_clear()
    config = tiny("--data.synthetic_train=5", "--curriculum.epochs=0.1")  # of less than a step
    assert preview(config, tmp_path / "preview.png").exists()
    assert "5 images, fewer than optim.batch_size 12: batches of 5\n" in capsys.readouterr().err


def test_unreadable_images_are_passed_over(tiny, tmp_path, monkeypatch) -> None:
    config = tiny()
    plan, dataset = dataset_of(config)
    views = list(training_views(config, plan, dataset))
    real, broken = DecodedDataset.__getitem__, set(range(0, 40, 2))

    def read(self, index: int):
        if index in broken:
            raise Unreadable("broken")
        return real(self, index)

    monkeypatch.setattr(DecodedDataset, "__getitem__", read)
    found = list(training_views(config, plan, dataset))
    assert len(found) == len(views)
    assert not all(torch.equal(a.images, b.images) for a, b in zip(found, views, strict=True))
    broken.update(range(40))
    assert draw_preview(config, plan, dataset) is None
    with pytest.raises(UserError, match="none of the first images of the training split can be"):
        preview(config, tmp_path / "preview.png")
