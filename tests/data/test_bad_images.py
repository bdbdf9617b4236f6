"""Unusual files are images; unreadable ones are named, counted and replaced, and stop a run."""

import contextlib
import itertools
import json
import os
import random
import shutil
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from hostile import broken, changed, encoded, noise, unreadable, unusual
from image_files import write_files, write_shard
from PIL import Image
from steps import before_step, signal_at, train_with

from finetune import ClassifierConfig, classify
from finetune.config import RecipeConfig
from finetune.training.transforms import LabelledTrainDataset
from mae_et import Interrupted, load_config, pretrain
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.curriculum.schedule import Curriculum
from mae_et.data.bad_images import ATTEMPTS, RECORD, WithSubstitutes, refuse_excess
from mae_et.data.datasets import open_dataset
from mae_et.data.images import decoding
from mae_et.data.loader import data_loader, replayed
from mae_et.data.prepare import prepare
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex
from mae_et.data.train_dataset import TrainDataset
from mae_et.data.transforms import EvalDataset, as_tensor
from mae_et.errors import RunFailed, Unreadable
from mae_et.io.metrics_file import read_metrics
from mae_et.training.plan import micro_batch_size

PLAN = Curriculum.preset("etpp", 32, 8).plan(6, 30, 10)


def views(root: Path, **data: object) -> list:
    """Return every kind of view of a folder."""
    config = DataConfig(root=root, **data)
    source = open_dataset(config, "train")
    return [
        TrainDataset(source, config, PLAN, 8, 0),
        TrainDataset(source, config, PLAN, 8, 0, "decode"),
        LabelledTrainDataset(source, config, RecipeConfig(), PLAN, 0),
        EvalDataset(source, config, 32),
        EvalDataset(source, config, (24, 32)),
    ]


def place_in(view, number: int):
    """Return an index of the type that a dataset takes: a sample index or a number."""
    return number if isinstance(view, EvalDataset) else SampleIndex(number, 0, len(PLAN.stages) - 1)


@pytest.mark.parametrize("name", unusual())
def test_unusual_files_decode_in_every_view(tmp_path: Path, name: str) -> None:
    write_files(tmp_path / "train", {name: unusual()[name]})
    for view, side in zip(views(tmp_path), [(32, 32)] * 4 + [(24, 32)], strict=True):
        shown = view[place_in(view, 0)][0]
        assert shown.shape == (3, *side)
        assert shown.float().isfinite().all()


@pytest.mark.parametrize("name", [*broken(), *unreadable()])
def test_unreadable_files_are_named_in_every_view(tmp_path: Path, name: str) -> None:
    root = write_files(tmp_path / "train", {n: c for n, c in broken().items() if n == name})
    if name in unreadable():
        unreadable()[name](root / name)
    for view in views(tmp_path):
        with pytest.raises(Unreadable) as caught:
            view[place_in(view, 0)]
        assert str(caught.value).startswith(f"cannot read the image {root / name}: ")
        assert "\n" not in str(caught.value)


def test_a_file_without_read_permission_is_named(tmp_path: Path) -> None:
    write_files(tmp_path / "train", {"0.png": encoded(noise(), "PNG")})
    (tmp_path / "train" / "0.png").chmod(0)
    view, user = views(tmp_path)[0], os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(Unreadable, match=r"0\.png: .*Permission denied"):
            view[SampleIndex(0, 0, 0)]
    finally:
        os.seteuid(user)


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    write_files(tmp_path / "train", {n: c for n, c in unusual().items() if "animated" in n})
    source = open_dataset(DataConfig(root=tmp_path), "train")
    first, second = (as_tensor(noise(seed=seed)).float() for seed in (0, 1))
    for number in range(3):
        image = as_tensor(source[number][0]).float()
        assert (image - first).abs().mean() < 0.7 * (image - second).abs().mean()


def test_images_are_limited_in_pixels_and_20_000_a_side_is_allowed(monkeypatch) -> None:
    assert decoding.MAX_PIXELS >= 20_000**2
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 48)
    decoding.decode(encoded(noise(), "PNG"), 3)
    with pytest.raises(ValueError, match=r"its 49 x 40 pixels are more than 1920"):
        decoding.decode(encoded(noise(40, 49), "PNG"), 3)


@pytest.mark.slow
def test_an_image_of_20_000_pixels_a_side_decodes_in_every_view(tmp_path: Path) -> None:
    """It takes 4 GiB where all of it is decoded."""
    large = noise(500, 500).resize((20_000, 20_000), Image.Resampling.NEAREST)
    write_files(tmp_path / "train", {"0.jpg": encoded(large, "JPEG", quality=50)})
    for view in views(tmp_path)[:4]:
        assert view[place_in(view, 0)][0].shape == (3, 32, 32)


def test_very_long_images_are_trimmed_before_they_are_scaled() -> None:
    """The middle is what a central view shows, whatever lies at the ends."""
    config, wide = DataConfig(eval_crop=1.0), noise(10, 160)

    longer = Image.new("RGB", (2160, 10))
    longer.paste(wide, (1000, 0))

    class Images(list):
        classes = ()

    usual, trimmed = EvalDataset(Images([(wide, 0), (longer, 0)]), config, 16)
    assert torch.equal(trimmed[0], usual[0])


# --- another image in its place -------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder of 30 images, and a copy with two unreadable ones."""
    files = {f"{n:02d}.png": encoded(noise(seed=n), "PNG") for n in range(30)}
    clean = write_files(tmp_path / "clean" / "train", files)
    spoilt = write_files(tmp_path / "spoilt" / "train", files)
    (spoilt / "07.png").write_bytes(b"")
    (spoilt / "21.png").write_bytes(files["21.png"][:200])
    return clean.parent, spoilt.parent


def batches(root: Path, workers: int = 0, start: int = 0, method: str = "fourier", **order) -> list:
    config = DataConfig(root=root)
    view = TrainDataset(open_dataset(config, "train"), config, PLAN, 8, 0, method)
    order = CurriculumBatchSampler(PLAN, 0, micro_batch_size(5, PLAN, 1), start_step=start, **order)
    loader = data_loader(WithSubstitutes(view), workers, batch_sampler=order)
    return list(replayed(iter(loader), order, view, False))


@pytest.mark.parametrize("method", ["fourier", "decode"])
def test_substitutes_leave_all_other_samples_unchanged(folders, method: str) -> None:
    """Neither their order, nor their crops, nor any mask; and batches keep their size."""
    clean, spoilt = (batches(root, method=method) for root in folders)
    replaced = 0
    for whole, other in zip(clean, spoilt, strict=True):
        same = other.replaced[:, 0] < 0
        replaced += int((~same).sum())
        assert torch.equal(whole.noise, other.noise) or method == "decode"
        assert torch.equal(whole.noise[same], other.noise[same])
        assert torch.equal(whole.images[same], other.images[same])
        assert not any(map(torch.equal, whole.images[~same], other.images[~same]))
        assert set(other.replaced[~same, 0].tolist()) <= {7, 21}
        assert whole.images.shape == other.images.shape
    epochs = PLAN.steps * PLAN.batch_size / PLAN.dataset_size
    assert 2 * int(epochs) <= replaced <= 2 * (int(epochs) + 1)


def test_substitutes_depend_on_neither_workers_nor_the_start_step(folders) -> None:
    alone = batches(folders[1])
    for found in (batches(folders[1], workers=2), batches(folders[1], start=4)):
        for expected, other in zip(alone[-len(found) :], found, strict=True):
            assert all(map(torch.equal, expected, other))


def test_a_replayed_bad_image_is_counted_once(folders) -> None:
    """Replay loads a draw once, and shows it several times."""
    shown = batches(folders[1], replay={PLAN.stages[0].bandwidth: 5}, replay_images=20)
    draws = [tuple(d) for batch in shown for d in batch.replaced.tolist() if d[0] >= 0]
    assert len(draws) == len(set(draws)) > 0


def test_the_loader_fails_when_no_image_can_be_read(folders) -> None:
    root = folders[1]
    view = views(root)[0]
    assert WithSubstitutes(view)[SampleIndex(7, 0, 0)].replaced.tolist() == [7, 0, 0]
    for path in (root / "train").iterdir():
        path.unlink()
    sentence = rf"07\.png.*; neither can {ATTEMPTS} random substitutes be read"
    with pytest.raises(RunFailed, match=sentence):
        WithSubstitutes(view)[SampleIndex(7, 0, 0)]


def test_folders_tar_shards_and_prepared_shards_substitute_alike(folders, tmp_path: Path) -> None:
    """Tar shards, and prepared ones, which show what the folder shows, bit for bit."""
    root = folders[1]
    files = {path.name: path.read_bytes() for path in sorted((root / "train").iterdir())}
    write_shard(tmp_path / "tar" / "all-train-0.tar", files)
    ready, data = tmp_path / "ready", DataConfig(root=root, max_bad_fraction=0.1)
    figures = prepare(PrepareConfig(ready, data, splits=("train",), levels=(24,)))
    assert figures["train"]["unreadable"] == 2
    sources = {
        name: open_dataset(DataConfig(name, where), "train")
        for name, where in (("folder", root), ("wds", tmp_path / "tar"), ("shards", ready))
    }
    for number, epoch in itertools.product(range(30), range(2)):
        index = SampleIndex(number, epoch, 0)
        first, *others = (
            WithSubstitutes(TrainDataset(source, DataConfig(), PLAN, 8, 0))[index]
            for source in sources.values()
        )
        assert all(all(map(torch.equal, first, other)) for other in others)
        assert (first.replaced[0] >= 0) == (number in {7, 21})
    sentence = r"image 7 of shard 0 .*could not be read when it was prepared"
    with pytest.raises(Unreadable, match=sentence):
        sources["shards"][7]


def test_preparing_stops_at_the_first_bad_image_or_at_too_many(folders, tmp_path: Path) -> None:
    def flags(**data):
        return PrepareConfig(
            tmp_path / "ready", DataConfig(root=folders[1], **data), splits=("train",),
            shard_images=10, num_workers=2,
        )  # fmt: skip

    # Two shards at a time: either may be the first to come upon one.
    with pytest.raises(Unreadable, match=r"07\.png: the file is empty|21\.png: .* truncated"):
        prepare(flags(on_error="stop"))
    with pytest.raises(RunFailed, match=r"[12] of 30 images of train cannot be read, more than"):
        prepare(flags(max_bad_fraction=0))
    assert prepare(flags())["train"]["unreadable"] == 2


# --- in a run -------------------------------------------------------------------------------------


def test_an_interrupted_run_reports_the_same_bad_images(tiny, folders, capsys) -> None:
    def config(name: str, workers: int = 1):
        return tiny(f"--data.root={folders[1]}", f"--output.dir={folders[1].parent / name}",
                    "--data.max_bad_fraction=0.1", "--optim.batch_size=6", "--output.log_every=1",
                    "--output.reconstruct_images=30",
                    f"--efficiency.num_workers={workers}")  # fmt: skip

    whole = pretrain(config("whole", 0))
    said = capsys.readouterr().err
    for name, reason in (("07.png", "the file is empty"), ("21.png", "truncated")):
        lines = [line for line in said.splitlines() if name in line]
        assert len(lines) == 1
        assert reason in lines[0]
    rows, results = read_metrics(whole), json.loads((whole / "results.json").read_text())
    record = read_metrics(whole, RECORD)
    assert sorted(row["sample"] for row in record) == [7, 21]
    assert results["unreadable_images"] == rows[-1]["unreadable"] == 2
    assert results["substituted"] == sum(row["substituted"] for row in rows) > 2
    first = record[0]["step"]
    with pytest.raises(Interrupted):
        train_with(signal_at(first + 1), config("parts"))
    parts = pretrain(config("parts"))
    same = itemgetter("step", "loss", "substituted", "unreadable")
    assert [*map(same, read_metrics(parts))] == [*map(same, rows)]
    assert read_metrics(parts, RECORD) == record
    same = itemgetter("loss", "substituted", "unreadable_images")
    assert same(json.loads((parts / "results.json").read_text())) == same(results)


def test_a_file_deleted_during_a_run_is_skipped_and_a_new_one_ignored(tiny, folders) -> None:
    def change() -> None:
        (folders[0] / "train" / "03.png").unlink()
        shutil.copy(folders[0] / "train" / "04.png", folders[0] / "train" / "035.png")

    config = tiny(f"--data.root={folders[0]}", "--data.max_bad_fraction=0.04",
                  "--curriculum.epochs=9")  # fmt: skip
    folder = train_with(before_step(4, change), config)
    record = read_metrics(folder, RECORD)
    assert [row["sample"] for row in record] == [3]
    assert "No such file" in record[0]["reason"]


def test_a_classifier_substitutes_in_training_and_never_in_evaluation(tmp_path: Path) -> None:
    """A score over fewer images would be another score."""
    files = {f"{n}.png": encoded(noise(seed=n), "PNG") for n in range(20)}
    root = tmp_path / "data"
    for split, name in itertools.product(("train", "val"), "ab"):
        write_files(root / split / name, files)
    (root / "train" / "a" / "3.png").write_bytes(b"")
    flags = [
        "--model={backbone: test_resnet, image_size: 32}", "--optim.batch_size=10",
        "--efficiency={num_workers: 0, device: cpu}", f"--output.dir={tmp_path / 'run'}",
        "--curriculum={preset: constant, epochs: 2, cost: area}", f"--data.root={root}",
        "--output={evaluate_every: 50%, log_every: 2}", "--data.max_bad_fraction=0.03",
    ]  # fmt: skip
    config = load_config(ClassifierConfig, [], flags)
    results = classify(config)
    assert (results["unreadable_images"], results["substituted"]) == (1, 2)
    (tmp_path / "run").rename(tmp_path / "before")
    (root / "val" / "b" / "5.png").write_bytes(b"")
    with pytest.raises(Unreadable, match=r"val/b/5\.png: the file is empty"):
        classify(config)


@pytest.mark.parametrize(
    ("fraction", "images", "count"),
    [(0.01, 5, 0), (0.01, 30, 3), (0.01, 60, 6), (0.01, 100, 10), (0.01, 1000, 10),
     (0.01, 1_281_167, 12_811), (0.0, 1000, 0), (0.5, 30, 15), (1.0, 5, 5)],
)  # fmt: skip
def test_small_datasets_tolerate_some_bad_images(fraction: float, images: int, count: int) -> None:
    """One percent of 60 images would be none."""
    refuse_excess(count, images, fraction)
    with pytest.raises(RunFailed, match=rf"^{count + 1} of {images} images cannot be read"):
        refuse_excess(count + 1, images, fraction)


@pytest.mark.parametrize(
    ("bad", "images", "fraction", "limit", "enough"),
    [(5, 44, 0.01, r"0\.01 allows \(4: a tenth of a small dataset, at most 10\): a", 0.114),
     (11, 500, 0.01, r"0\.01 allows \(10: a tenth of a small dataset, at most 10\): a", 0.022),
     (21, 2000, 0.01, r"0\.01 allows: a", 0.011), (1, 44, 0.0, r"0 allows: a", 0.023)],
)  # fmt: skip
def test_too_many_bad_images_are_reported_with_the_limit_that_holds(
    bad: int, images: int, fraction: float, limit: str, enough: float
) -> None:
    """And with the value that accepts them."""
    advice = rf"; to accept them, set data.max_bad_fraction {enough}$"
    with pytest.raises(
        RunFailed, match=rf"^{bad} of {images} images cannot be .*on {limit}{advice}"
    ):
        refuse_excess(bad, images, fraction, which=": a")
    refuse_excess(bad, images, enough)


# --- any bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_bytes_decode_or_raise_unreadable(tmp_path: Path, count: int) -> None:
    """Whole or at a bandwidth; nothing else is raised, and nothing takes long."""
    chance = random.Random(0)
    files = [c for c in (unusual() | broken()).values() if len(c) < 20_000]
    root = tmp_path / "train"
    write_files(root, {"x.png": b""})
    view, small = views(tmp_path)[:2]
    read = 0
    for number in range(count):
        content = files[number % len(files)]
        (root / "x.png").write_bytes(changed(content, chance))
        for each in (view, small):
            with contextlib.suppress(Unreadable):
                assert each[SampleIndex(0, number, 0)].images.shape[0] == 3
                read += 1
    print(f"{count} files in two views: {read} read, {2 * count - read} refused by name")
    assert 0 < read < 2 * count
