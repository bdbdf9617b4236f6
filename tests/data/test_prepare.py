"""Prepared shards hold the files of a dataset and smaller copies, complete or not at all."""

import contextlib
import json
import pickle
import shutil
import tarfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from flipped import flipped
from hostile import png
from natural_images import jpeg, natural
from PIL import Image

import mae_et.data.prepare as preparing
from mae_et import Curriculum, Stage, UserError
from mae_et.cli.main import main
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.data.images.boxes import Box
from mae_et.data.prepare import prepare
from mae_et.data.sampler import SampleIndex
from mae_et.data.sources.array_files import read_array, write_array
from mae_et.data.sources.prepared_shards import PreparedDataset, archive_path
from mae_et.data.sources.shard_writer import new_archive
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import RunFailed, Unreadable

LEVELS = (48, 72)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(14):
        split = "train" if number < 10 else "val"
        path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(natural(90, 120, number)))
    return tmp_path / "data"


def config(root: Path, **options) -> PrepareConfig:
    options = {"levels": LEVELS, "shard_images": 4} | options
    return PrepareConfig(root.parent / "shards", DataConfig(root=root), **options)


def opened(root: Path, split="train", channels: int = 3) -> PreparedDataset:
    source = open_dataset(DataConfig("shards", root.parent / "shards"), split, channels)
    assert isinstance(source, PreparedDataset)
    return source


def same(one: ImageDataset, other: ImageDataset) -> bool:
    return len(one) == len(other) and all(
        one[i][1] == other[i][1] and np.array_equal(np.asarray(one[i][0]), np.asarray(other[i][0]))
        for i in range(len(one))
    )


def test_prepared_images_labels_and_classes_equal_the_folders(root: Path) -> None:
    summary = prepare(config(root))
    assert [summary[split]["images"] for split in ("train", "val")] == [10, 4]
    for split in ("train", "val"):
        source, shards = open_dataset(DataConfig(root=root), split), opened(root, split)
        assert same(source, shards)
        assert list(shards.classes) == list(source.classes) == ["a", "b"]
        assert same(open_dataset(DataConfig(root=root), split, 1), opened(root, split, 1))
    assert same(opened(root), pickle.loads(pickle.dumps(opened(root))))  # as in a spawned worker


def test_a_small_crop_reads_the_smallest_sufficient_level(root: Path) -> None:
    prepare(config(root))
    shards = opened(root)
    read: list[int] = []
    keep = shards.files.read
    shards.files.read = lambda index, place: read.append(place) or keep(index, place)  # type: ignore
    for size in (38, 39, 57, 58):
        _, label, _ = shards.read_for_crop(7, lambda h, w: Box(0, 0, h, w), size)
        assert label == 1
    assert read == [0, 1, 1, 2]
    _, _, draw = shards.read_for_crop(3, lambda h, w: Box(9, 12, h / 2, w / 2), 16)
    assert draw(48, 64) == pytest.approx((4.8, 6.4, 24, 32))


def test_each_archive_is_a_webdataset(root: Path) -> None:
    prepare(config(root))
    for level in (*LEVELS, "original"):
        folder = root.parent / f"wds-{level}" / "train"
        folder.mkdir(parents=True)
        for path in (root.parent / "shards" / "train").glob(f"*-{level}.tar"):
            (folder / path.name).symlink_to(path)
        source = open_dataset(DataConfig("wds", folder.parent), "train")
        assert [source[i][1] for i in range(10)] == [opened(root)[i][1] for i in range(10)]
        image = source[0][0]
        assert isinstance(image, Image.Image)
        assert min(image.size) == (90 if level == "original" else level)


def test_files_of_every_format_are_kept(tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    image = natural(90, 120)
    for number, (mode, ending) in enumerate(
        [("RGB", "png"), ("RGBA", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "gif"),
         ("RGB", "webp"), ("I;16", "png")]
    ):  # fmt: skip
        converted = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        converted.save(tmp_path / "data" / "train" / f"{number}.{ending}")
    natural(40, 44).save(tmp_path / "data" / "train" / "7.jpg")
    np.save(tmp_path / "data" / "train" / "8.npy", np.zeros((40, 50, 3), np.uint8))
    prepare(config(tmp_path / "data", splits=("train",)))
    source, shards = (
        open_dataset(DataConfig(root=tmp_path / "data"), "train"),
        opened(tmp_path / "data"),
    )
    assert same(source, shards)
    names: dict[int, list[str]] = {0: [], 48: []}
    for level, shard in product(names, range(3)):
        with tarfile.open(archive_path(tmp_path / "shards" / "train", shard, level)) as archive:
            names[level] += archive.getnames()
    endings = {level: " ".join(Path(name).suffix for name in names[level]) for level in names}
    assert endings == {0: ".png .png .jpg .jpg .gif .webp .png .jpg .npy", 48: ".jpg .jpg .jpg"}
    plan = Curriculum((Stage(32, 1),), 32, 8).plan(3, 50, 9)
    one, other = (TrainDataset(of, DataConfig(), plan, 8, 0, "decode") for of in (source, shards))
    for index in range(9):
        images = (
            one[SampleIndex(index, 0, 0)].images.float(),
            other[SampleIndex(index, 0, 0)].images.float(),
        )
        assert (images[0] - images[1]).abs().mean() < 8


def test_crops_of_16_bit_colours_are_refused_with_a_range_as_whole_images_are(tmp_path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    rows = b"".join(b"\0" + bytes(6 * 90) for _ in range(90))
    (tmp_path / "data" / "train" / "0.png").write_bytes(png(90, 90, 16, 2, rows))
    prepare(config(tmp_path / "data", splits=("train",)))
    data = DataConfig("shards", tmp_path / "shards", max_value=4095, scale=(1, 1))
    plan = Curriculum((Stage(32, 1),), 32, 8).plan(1, 1, 1)
    crops = TrainDataset(open_dataset(data, "train"), data, plan, 8, 0, "decode")
    with pytest.raises(Unreadable, match="16-bit colours decode to their high byte"):
        crops[SampleIndex(0, 0, 0)]


def test_an_index_with_labels_outside_the_classes_is_damaged(root: Path) -> None:
    prepare(config(root))
    path = root.parent / "shards" / "val" / "00000.npy"
    for label in (-2, 2):  # of classes 0 and 1, and -1 for none
        rows = read_array(path).copy()
        rows["label"][0] = label
        write_array(path, rows)
        with pytest.raises(UserError, match="a label lies outside its 2 classes"):
            opened(root, "val")


def test_an_interrupted_preparation_resumes(root: Path, monkeypatch) -> None:
    keep, done = preparing.write_shard, []

    def interrupted(source, config, folder, shard) -> None:
        if len(done) == 2:
            (folder / f".{shard:05d}-48.tar.part").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(shard)
        keep(source, config, folder, shard)

    monkeypatch.setattr(preparing, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(root))
    with pytest.raises(UserError, match=r"not a prepared split.*split\.json"):
        opened(root)
    times = {path: path.stat().st_mtime_ns for path in (root.parent / "shards").rglob("*.npy")}
    assert len(times) == 2
    monkeypatch.setattr(preparing, "write_shard", keep)
    prepare(config(root))
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert same(open_dataset(DataConfig(root=root), "train"), opened(root))
    assert not list((root.parent / "shards").rglob("*.part"))


def test_a_failed_preparation_starts_no_further_shard_and_leaves_no_part_of_one(
    root: Path, monkeypatch
) -> None:
    started = []

    def fails(*_: object) -> None:
        started.append(1)
        time.sleep(0.01)
        raise OSError("disk full")

    monkeypatch.setattr(preparing, "write_shard", fails)
    with pytest.raises(OSError, match="disk full"):
        list(preparing._write_shards(None, config(root, num_workers=2), root, range(1000)))
    assert len(started) < 500
    with pytest.raises(OSError, match="disk full"), new_archive(root / "00000.tar"):
        fails()
    assert not list(root.glob(".*")) + list(root.glob("*.tar"))


def test_a_preparation_with_other_settings_is_not_resumed(root: Path) -> None:
    prepare(config(root))
    with pytest.raises(UserError, match=r"quality was 95 and is now 90"):
        prepare(config(root, quality=90))
    (root / "train" / "a" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"images was \d+ and is now \d+"):
        prepare(config(root))


def test_shards_of_other_images_or_labels_are_not_taken_for_finished(root: Path) -> None:
    prepare(config(root))
    shards = root.parent / "shards"
    path = root / "train" / "a" / "0.jpg"
    content = path.read_bytes()
    path.write_bytes(jpeg(natural(90, 120, 99)))
    with pytest.raises(UserError, match=r"train was prepared from other images: .*a/0\.jpg"):
        prepare(config(root))
    path.write_bytes(content)
    # A class between the others changes the labels of val, whose files stay as they were.
    (root / "train" / "aa").mkdir()
    (root / "train" / "aa" / "0.jpg").write_bytes(content)
    shutil.rmtree(shards / "train")
    with pytest.raises(UserError, match=r"val was prepared .*: data was '\w+' and is now"):
        prepare(config(root))
    recipe = shards / "val" / "recipe.json"
    earlier = json.loads(recipe.read_text())
    del earlier["data"]
    recipe.write_text(json.dumps(earlier))
    with pytest.raises(UserError, match=r"data was not recorded \(by another version of mae-et\)"):
        prepare(config(root))


def test_a_damaged_byte_is_found_on_reading_and_verifying(root: Path, capsys) -> None:
    prepare(config(root, splits=("train",)))
    output = root.parent / "shards"
    flags = ["prepare", f"--output={output}", "--splits=[train]", "--verify=true"]
    assert main(flags) == 0
    assert json.loads(capsys.readouterr().out)["train"]["images"] == 10
    path = archive_path(output / "train", 1, 0)
    content = bytearray(path.read_bytes())
    content[int(opened(root).files.rows["offset"][5][-1]) + 40] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RunFailed, match=r"00001-original\.tar is damaged: its checksum"):
        opened(root)[5]
    assert opened(root)[4][1] == 0
    assert main(flags) == 1
    assert "its checksum does not match" in capsys.readouterr().err.splitlines()[-1]


def test_verify_notices_a_flipped_bit_in_labels_sizes_classes_or_counts(root: Path, capsys) -> None:
    prepare(config(root, splits=("train",)))
    folder = root.parent / "shards" / "train"
    flags = ["prepare", f"--output={folder.parent}", "--splits=[train]", "--verify=true"]
    for name, step in (("00001.npy", 61), ("split.json", 31)):
        path = folder / name
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), step):
            path.write_bytes(flipped(content, bit))
            with pytest.raises(UserError, match=rf"{name} (is damaged|cannot be read)"):
                opened(root)
        assert main(flags) == 2
        assert name in capsys.readouterr().err
        path.write_bytes(content)
    assert main(flags) == 0


def swap(folder: Path, *names: str) -> None:
    """Exchange two files, as a wrong copy of a shard does: each matches its own checksum."""
    one, other = (folder / name for name in names)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_whole_files_in_wrong_places_give_no_wrong_image_and_fail_verification(root: Path) -> None:
    prepare(config(root, splits=("train",)))
    folder, expected = (
        root.parent / "shards" / "train",
        open_dataset(DataConfig(root=root), "train"),
    )
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for spoil in (
        lambda: swap(folder, "00000.npy", "00001.npy"),
        lambda: swap(folder, "00000-original.tar", "00001-original.tar"),
        lambda: (folder / "00002-original.tar").write_bytes(b""),
        lambda: (folder / "00002.npy").write_bytes(b""),
    ):
        spoil()
        with pytest.raises((RunFailed, UserError)):
            prepare(config(root, splits=("train",), verify=True))
        with contextlib.suppress(UserError):
            shards = opened(root)
            for index in range(len(shards)):
                with contextlib.suppress(Unreadable):
                    assert np.array_equal(*(np.asarray(s[index][0]) for s in (shards, expected)))
        for path, content in whole.items():
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--levels=[72,48]"], "levels must be rising"),
        (["--quality=0"], "quality must lie"),
        (["--data.name=synthetic"], "data.name synthetic has no files to prepare"),
    ],
)
def test_impossible_preparations_are_refused(flags, sentence, tmp_path: Path, capsys) -> None:
    assert main(["prepare", f"--output={tmp_path / 'out'}", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_output_inside_the_dataset_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"lies in data\.root"):
        PrepareConfig(root / "shards", DataConfig(root=root))


def test_shards_do_not_depend_on_workers(root: Path, tmp_path: Path) -> None:
    prepare(config(root))
    one = {p.name: p.read_bytes() for p in (root.parent / "shards" / "train").glob("*.npy")}
    prepare(replace(config(root), output=tmp_path / "other", num_workers=2))
    assert one == {p.name: p.read_bytes() for p in (tmp_path / "other/train").glob("*.npy")}
