"""Image folders: splits, classes, held-out images, listings."""

import os
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from flipped import flipped
from image_files import folder, refusal, save, values

from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.images.decoding import FORMATS
from mae_et.data.layout import Split
from mae_et.data.sources.file_listing import list_folder
from mae_et.data.sources.image_folder import (
    ImageFolder,
    class_names,
    classes_without_images,
    open_image_files,
)
from mae_et.data.sources.synthetic import Synthetic
from mae_et.errors import Unreadable, UserError


def test_images_and_the_classes_of_train_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    for value, name in enumerate(("train/b/0.png", "train/b/1.PNG", "train/a/deep/er/2.png")):
        save(tmp_path / name, value)
    save(tmp_path / "val/b/3.png", 3)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    train, val = open_dataset(folder(tmp_path), "train"), open_dataset(folder(tmp_path), "val")
    assert list(train.classes) == list(val.classes) == ["a", "b"]
    assert values(train) == [(2, 0), (0, 1), (1, 1)]
    with pytest.raises(IndexError):
        train[3]
    assert values(val) == [(3, 1)]


def test_a_class_missing_in_train_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "val/a/0.png", "val/zebra/0.png"):
        save(tmp_path / name)
    assert "zebra" in refusal(folder(tmp_path), "val")
    assert len(open_dataset(folder(tmp_path), "train")) == 1


@pytest.mark.parametrize("twin", ["E\u0301mu", "\u00e9mu", "\u00c9mu "])
def test_classes_whose_names_look_alike_are_reported(tmp_path: Path, twin: str, capsys) -> None:
    name = "\u00c9mu"
    for place in (f"train/{name}", "train/7", "train/70", f"val/{twin}", "val/7"):
        save(tmp_path / place / "0.png")
    assert "names that differ only in case, spaces, leading zeros" in refusal(
        folder(tmp_path), "val"
    )
    open_dataset(folder(tmp_path), "train")
    assert "names that" not in capsys.readouterr().err
    save(tmp_path / "train" / twin / "0.png")
    open_dataset(folder(tmp_path), "train")
    assert f": {', '.join(sorted([name, twin]))}\n" in capsys.readouterr().err


def test_a_file_outside_the_class_folders_makes_a_split_unlabelled(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/loose.png"):
        save(tmp_path / name)
    val = open_dataset(folder(tmp_path), "val")
    assert {label for _, label in values(val)} == {-1}
    assert list(val.classes) == []
    save(tmp_path / "train/loose.png")
    (tmp_path / "val/loose.png").unlink()
    for split in ("train", "val"):
        source = open_dataset(folder(tmp_path), split)
        assert {label for _, label in values(source)} == {-1}


def test_split_folders_may_have_any_configured_name(tmp_path: Path) -> None:
    save(tmp_path / "fit/a/0.png", 5)
    save(tmp_path / "test/a/0.png", 6)
    config = folder(tmp_path, "fit", "test")
    assert values(open_dataset(config, "train")) == [(5, 0)]
    assert values(open_dataset(config, "val")) == [(6, 0)]
    assert "no folder training" in refusal(folder(tmp_path, "training", "test"))
    assert "no folder training" in refusal(folder(tmp_path, "training", "tset"))
    (tmp_path / "test").rename(tmp_path / "airport")  # does not look like a split
    assert "no folder val" in refusal(folder(tmp_path, "fit"), "val")


@pytest.mark.parametrize(("there", "requested"), [("train", "val"), ("val", "train")])
def test_a_missing_split_beside_another_is_refused(
    tmp_path: Path, there: str, requested: Split
) -> None:
    save(tmp_path / there / "a/0.png")
    assert f"has no {requested} split" in refusal(folder(tmp_path), requested)


def test_without_splits_a_fifth_of_each_class_is_held_out(tmp_path: Path, capsys) -> None:
    """At least one image, if there are two."""
    for name, count in (("a", 10), ("b", 25), ("c", 4), ("d", 2), ("e", 1)):
        for i in range(count):
            save(tmp_path / name / f"{i}.png")
    train, val = (open_dataset(folder(tmp_path), split) for split in ("train", "val"))
    assert isinstance(train, ImageFolder)
    assert isinstance(val, ImageFolder)
    names = [{str(s.name(i)) for i in range(len(s))} for s in (train, val)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {str(path) for path in tmp_path.rglob("*.png")}
    assert [[label for _, label in values(val)].count(i) for i in range(5)] == [2, 5, 1, 1, 0]
    assert list(train.classes) == list(val.classes) == ["a", "b", "c", "d", "e"]
    said = "33 images of 5 classes; no split folders, so 9 of 42 are held out as val"
    assert said in capsys.readouterr().err


def test_held_out_images_depend_on_names_and_survive_additions(tmp_path: Path) -> None:
    def held_out(root: Path) -> set[str]:
        source = open_dataset(folder(root), "val")
        assert isinstance(source, ImageFolder)
        return {str(Path(str(source.name(i))).relative_to(root)) for i in range(len(source))}

    here, there = tmp_path / "here", tmp_path / "there"
    for i in range(20):
        save(here / f"{i}.png", i)
        save(there / f"{19 - i}.png", 7)
    before = held_out(here)
    assert len(before) == 4
    assert before == held_out(there)
    assert before != set(sorted(f"{i}.png" for i in range(20))[:4])
    save(here / "new.png")
    assert len(before - held_out(here)) <= 1


def test_a_single_image_is_never_held_out(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    assert len(open_dataset(folder(tmp_path), "train")) == 1
    assert "too few images" in refusal(folder(tmp_path), "val")


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no'} is not a folder" in refusal(folder(tmp_path / "no"))
    assert f"data.root no is not a folder in {Path.cwd()}" in refusal(folder(Path("no")))
    assert "data.root is needed" in refusal(DataConfig(name="folder"))
    (tmp_path / "train").mkdir()
    assert f"no image in {tmp_path / 'train'} " in refusal(folder(tmp_path))
    with pytest.raises(UserError, match="cannot list the folder"):
        list_folder(tmp_path / "no")
    with pytest.raises(UserError, match="images: there is no file or folder"):
        open_image_files([tmp_path / "no.jpg"], 3)


def test_hidden_files_are_skipped_and_links_followed_once(tmp_path: Path) -> None:
    save(tmp_path / "photos/a.JPG")
    save(tmp_path / "photos/._b.jpg", format="JPEG")
    save(tmp_path / "photos/.thumbnails/a.jpg")
    save(tmp_path / "photos/@eaDir/a.JPG/SYNOPHOTO_THUMB_M.jpg")
    save(tmp_path / "elsewhere/c.jpg")
    save(tmp_path / "elsewhere/d.jpg")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/e.jpg").symlink_to(tmp_path / "elsewhere/d.jpg")
    (tmp_path / "photos/linked/circle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/circle").symlink_to(".")
    assert list_folder(tmp_path / "photos").names == [
        "a.JPG",
        "e.jpg",
        "linked/c.jpg",
        "linked/d.jpg",
    ]
    assert len(open_dataset(folder(tmp_path / "photos", ".", "val"), "train")) == 4


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    content = save(tmp_path / "0.png", 9).read_bytes()
    for i in range(9):
        with open(os.fsencode(tmp_path) + b"/\xff%d.png" % i, "wb") as file:  # noqa: PTH123
            file.write(content)
    train, val = open_dataset(folder(tmp_path), "train"), open_dataset(folder(tmp_path), "val")
    assert values(train) + values(val) == [(9, -1)] * 10


def test_validation_on_the_training_images_is_reported(tmp_path: Path, capsys) -> None:
    for number in range(4):
        save(tmp_path / f"all/{'ab'[number % 2]}/{number}.png", number)
    config = DataConfig(root=tmp_path, train_split="all", val_split="all")
    assert len(open_dataset(config, "train")) == len(open_dataset(config, "val")) == 4
    assert capsys.readouterr().err.count("validation images are the training images") == 1


def test_a_kept_listing_is_read_without_a_walk(tmp_path: Path, monkeypatch, capsys) -> None:
    for number in range(6):
        save(tmp_path / f"data/train/{'ab'[number % 2]}/{number}.png", number)
    config = DataConfig(root=tmp_path / "data", listing=tmp_path / "kept")
    first = values(open_dataset(config, "train"))
    (kept,) = (tmp_path / "kept").iterdir()
    monkeypatch.setattr(
        "mae_et.data.sources.file_listing.list_folder", lambda *_: pytest.fail("walked again")
    )
    assert "files as listed at" not in capsys.readouterr().err
    assert values(open_dataset(config, "train")) == first
    assert f"6 files as listed at {date.today().year}" in capsys.readouterr().err
    assert len(first) == 6
    with pytest.raises(UserError, match="cannot be written to: File exists"):  # before the walk
        open_dataset(replace(config, listing=kept), "train")
    content = kept.read_bytes()
    for damaged in (content[:50], *(flipped(content, bit) for bit in range(7, 8 * 200, 97))):
        kept.write_bytes(damaged)
        with pytest.raises(UserError, match=r"listing .* is damaged .*: delete it"):
            open_dataset(config, "train")


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    for split, classes in (("train", "abc"), ("val", "ac")):
        for name in classes:
            save(tmp_path / split / name / "1.png", 1)
    config = DataConfig(root=tmp_path)
    assert classes_without_images(open_dataset(config, "train")) == []
    assert classes_without_images(open_dataset(config, "val")) == ["b"]
    assert classes_without_images(Synthetic(10, 16)) == []


def test_control_characters_in_image_names_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "red\x1b[31m\nline.png").write_bytes(b"")
    source = open_dataset(DataConfig(root=tmp_path / "..", train_split=tmp_path.name), "train")
    with pytest.raises(Unreadable, match=r"red\\x1b\[31m\\nline\.png: the file is empty$"):
        source[0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([str(i) for i in range(12)], [str(i) for i in range(12)]),
        ([f"{i:02d}" for i in range(12)], [f"{i:02d}" for i in range(12)]),
        ([str(i) for i in range(1, 12)], sorted(str(i) for i in range(1, 12))),
        (["10", "9", "cat"], ["10", "9", "cat"]),
    ],
)
def test_class_folders_0_to_n_are_in_numeric_order(names: list[str], expected: list[str]) -> None:
    assert class_names([f"{name}/0.png" for name in names]) == expected


def test_numeric_classes_keep_their_numbers_in_both_splits(tmp_path: Path, capsys) -> None:
    for split in ("train", "val"):
        for i in range(12):
            save(tmp_path / split / str(i) / "0.png", i)
    for split in ("train", "val"):
        found = values(open_dataset(folder(tmp_path), split))  # type: ignore[arg-type]
        assert all(value == label for value, label in found)
        assert len(found) == 12
    assert "classes 0 to n-1 in numeric order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extension", "kind"),
    [(".jfif", "JPEG"), (".jpe", "JPEG"), (".JPE", "JPEG"), (".jp2", "JPEG2000"),
     (".avif", "AVIF"), (".pnm", "PPM"), (".apng", "PNG"), (".mpo", "JPEG")],
)  # fmt: skip
def test_less_common_extensions_are_read(tmp_path: Path, extension: str, kind: str) -> None:
    if kind not in FORMATS:
        pytest.skip(f"this build of Pillow has no {kind}")
    save(tmp_path / f"train/a/0{extension}", 40, format=kind)
    ((value, label),) = values(open_dataset(folder(tmp_path), "train"))
    assert abs(value - 40) <= 3
    assert label == 0


def test_skipped_files_are_counted_by_extension_in_one_line(tmp_path: Path, capsys) -> None:
    for i in range(3):
        save(tmp_path / f"train/a/{i}.png")
        (tmp_path / f"train/a/{i}.TXT").write_text("")
    for name in ("Thumbs.db", "LICENSE", ".DS_Store", "._0.png"):
        (tmp_path / "train/a" / name).write_text("")
    for _ in range(2):
        open_dataset(folder(tmp_path), "train")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert line == (
        f"mae-et: train split of {tmp_path}: 3 images of 1 classes; "
        "5 files skipped (3 .txt, 1 without extension, 1 .db)"
    )


def test_an_ordinary_folder_prints_nothing(tmp_path: Path, capsys) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "a/0.png")
        open_dataset(folder(tmp_path), split)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_folders_that_are_no_classes_are_reported(tmp_path: Path, capsys) -> None:
    for name in ("plants/oak/0.png", "plants/elm/0.png", "animals/0.png", "animals/1.png"):
        save(tmp_path / "train" / name)
    (tmp_path / "train/fungi").mkdir()
    assert list(open_dataset(folder(tmp_path), "train").classes) == ["animals", "plants"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"mae-et: train split of {tmp_path}: 4 images of 2 classes; the first folder is the class, "
        "not those below (plants/elm/0.png); for classes of those below, link them into one "
        "folder: ln -s; folders without images: 1 (fungi)"
    )


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("a.dcm", r"1 file skipped \(1 \.dcm\); save them as 16-bit PNG or as \.npy"),
        ("a.zip", r"1 file skipped \(1 \.zip\); unpack the archive"),
        ("a.tar", r"1 file skipped \(1 \.tar\); tar shards are read with --data\.name wds"),
        ("data/train-00000.parquet", r"\.parquet\); .*--data\.name hfds/FOLDER"),
        (None, r"\(of 3 channels: .*\.png"),
    ],
)
def test_a_folder_without_images_says_how_to_read_its_files(
    file: str | None, sentence: str, tmp_path: Path
) -> None:
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"there is no image in .*{sentence}"):
        open_dataset(folder(tmp_path), "train")


def test_prepared_shards_given_as_a_folder_are_recognised(tmp_path: Path) -> None:
    for name in ("00000.npy", "recipe.json", "split.json"):  # an array may be an image
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).touch()
    assert f"give --data.name shards --data.root {tmp_path}" in refusal(folder(tmp_path))


def test_an_archive_and_an_only_split_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    assert "is not a folder: unpack it, or give its folder" in refusal(folder(tmp_path / "a.zip"))
    save(tmp_path / "set/train/a/0.png")
    advice = f"or hold out a fifth of it, with --data.root {tmp_path / 'set/train'}"
    assert advice in refusal(folder(tmp_path / "set"), "val")


def test_folders_of_images_beside_the_splits_are_reported(tmp_path: Path, capsys) -> None:
    """A class called train would be taken for the whole of the training images."""
    for name in ("train/0.png", "car/0.png", "plane/0.png", "notes/0.txt", "test/0.png"):
        save(tmp_path / name) if name.endswith("png") else (tmp_path / "notes").mkdir()
    open_dataset(folder(tmp_path), "train")
    assert "other folders, not read: car, plane\n" in capsys.readouterr().err
