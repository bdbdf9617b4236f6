"""Datasets that a list of files names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et import UserError
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.fingerprint import fingerprint
from mae_et.data.sources.file_lists import read_file_list
from mae_et.errors import UnknownClasses

NAMES = ("a.jpg", "b.png", "my cat, 2.png", "d.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


def read(root: Path, name: str, content: str | bytes) -> dict[str, str]:
    path = root / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = read_file_list(path)
    return dict(zip(found.names, found.labels, strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "path,label\nimages/a.jpg,cat\nimages/b.png,dog\n"),
        ("x.csv", b"\xef\xbb\xbfFilename,Class\r\nimages/a.jpg,cat\r\nimages/b.png,dog\r\n"),
        ("x.csv", 'images/a.jpg, cat\n"images/b.png","dog"\n\n'),
        ("x.csv", "id;label;path\n1;cat;images/a.jpg\n2;dog;images/b.png\n"),
        ("x.csv", "what,where\ncat,images/a.jpg\ndog,./images/b.png\ndog,images/b.png\n"),
        ("x.tsv", "images/a.jpg\tcat\nimages/b.png\tdog"),
        ("x.txt", "images/a.jpg cat\nimages/b.png   dog\n"),
        ("x.txt", "images/a.jpg,cat\nimages/b.png,dog\n"),
    ],
)
def test_every_spelling_of_a_list_gives_the_same_files_and_labels(
    root: Path, name: str, content: str | bytes
) -> None:
    assert read(root, name, content) == {"images/a.jpg": "cat", "images/b.png": "dog"}


def test_names_with_spaces_and_commas_are_read(root: Path) -> None:
    assert read(root, "x.csv", 'path\n"images/my cat, 2.png"\n') == {"images/my cat, 2.png": ""}
    assert read(root, "x.txt", "images/my cat, 2.png\n") == {"images/my cat, 2.png": ""}
    assert read(root, "y.txt", "images/my cat.png 3\n") == {"images/my cat.png": "3"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ("path,label\n", "names no image in its first rows"),
        ("1,cat\n2,dog\n", "names no image in its first rows"),
        ("images/a.jpg,cat\nimages/a.jpg,dog\n", "two labels for images/a.jpg: 'cat' and 'dog'"),
        ("images/a.jpg,cat\nimages/b.png\n", "'images/b.png' does not have 2 columns"),
        ("images/a.jpg\nimages/b.doc\n", r"1 of 2 files in .* are no images by their extension"),
        ("images/a.jpg\nno.jpg\nim/x.jpg\n", r"2 of 3 files .* are not there \(no.jpg, im/x.jpg\)"),
        (b"\xff.jpg\n", "cannot read the list"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(
    root: Path, content: str | bytes, sentence: str
) -> None:
    path = root / "x.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=sentence):
        open_dataset(DataConfig(root=path), "train")


def test_lists_are_the_splits_of_a_root(root: Path, capsys) -> None:
    (root / "a.csv").write_text("images/a.jpg,10\nimages/b.png,9\nimages/d.jpg,10\n")
    (root / "b.csv").write_text("images/d.jpg,10\n")
    config = DataConfig(root=root, train_split="a.csv", val_split="b.csv")
    train, val = (open_dataset(config, split) for split in ("train", "val"))  # type: ignore[arg-type]
    assert train.classes == val.classes == ["9", "10"]
    assert train.labels is not None
    assert (train.labels.tolist(), np.asarray(train[1][0]).max(), val[0][1]) == ([1, 0, 1], 1, 1)
    assert (
        capsys.readouterr().err == f"mae-et: val split of {root}: no image of 1 of 2 classes (9)\n"
    )
    (root / "b.csv").write_text("images/d.jpg,lynx\n")
    with pytest.raises(UnknownClasses, match="lynx"):
        open_dataset(config, "val")


def test_a_list_as_root_is_held_out_in_part_and_classes_follow_their_file(
    root: Path, capsys
) -> None:
    rows = [f"images/{number}.png,{number % 2}" for number in range(20)]
    for number in range(20):
        Image.new("RGB", (8, 8)).save(root / "images" / f"{number}.png")
    (root / "all.csv").write_text("path,label\n" + "\n".join([*rows, rows[0]]))
    (root / "classes.txt").write_text("zebra\nape\n")
    config = DataConfig(root=root / "all.csv")
    train, val = (open_dataset(config, split) for split in ("train", "val"))  # type: ignore[arg-type]
    assert (len(train), len(val), train.classes) == (16, 4, ["zebra", "ape"])
    assert (
        f"train split of {root / 'all.csv'}: 16 images of 2 classes; 4 of 20 are held out as val; "
        "rows that repeat a file: 1; classes in the order of classes.txt\n"
    ) in capsys.readouterr().err
    whole = open_dataset(DataConfig(root=root / "all.csv", val_split="."), "val")
    assert len(whole) == 20
    before = fingerprint(train)
    assert fingerprint(open_dataset(config, "train")) == before
    (root / "all.csv").write_text("\n".join(rows).replace("images/3.png,1", "images/3.png,0"))
    assert fingerprint(open_dataset(config, "train")) != before


def test_a_list_beside_images_that_is_not_read_is_named(root: Path, capsys) -> None:
    (root / "train.csv").write_text("images/a.jpg,cat\nimages/b.png,dog\n")
    (root / "notes.txt").write_text("about these images\n")
    open_dataset(DataConfig(root=root), "train")
    found = capsys.readouterr().err
    assert "; lists of images, not read: train.csv (--data.train_split NAME); 2 files" in found
