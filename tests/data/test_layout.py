"""Split folders are recognised, or refused with the keys that name them; never read as classes."""

from pathlib import Path

import pytest
from image_files import folder, refusal, save, values

from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.layout import looks_split, split_folder, split_names


def make(root: Path, *splits: str, per_class: int = 2) -> Path:
    for number, split in enumerate(splits):
        for name in "ab":
            for i in range(per_class):
                save(root / split / name / f"{i}.png", 10 * number)
    return root


@pytest.mark.parametrize(
    ("train", "val"),
    [("Training", "Testing"), ("train", "valid"), ("TRAIN", "VAL"), ("training", "validation"),
     ("Train", "Test"), ("train", "Valid")],
)  # fmt: skip
def test_usual_split_names_are_recognised_in_any_case(
    tmp_path: Path, train: str, val: str, capsys
) -> None:
    config = folder(make(tmp_path, train, val))
    assert values(open_dataset(config, "train")) == [(0, 0), (0, 0), (0, 1), (0, 1)]
    found = open_dataset(config, "val")
    assert values(found) == [(10, 0), (10, 0), (10, 1), (10, 1)]
    assert list(found.classes) == ["a", "b"]
    if val != "val":
        line = f"mae-et: val split of {tmp_path}: 4 images of 2 classes; the folder is {val}"
        assert line in capsys.readouterr().err.splitlines()


def test_validation_is_preferred_to_test(tmp_path: Path) -> None:
    config = folder(make(tmp_path, "train", "valid", "test"))
    assert {value for value, _ in values(open_dataset(config, "val"))} == {10}
    named = folder(tmp_path, val_split="test")
    assert {value for value, _ in values(open_dataset(named, "val"))} == {20}


def test_the_configured_name_comes_first_and_other_names_have_no_synonyms() -> None:
    assert split_names(DataConfig(), "val")[:2] == ("val", "valid")
    assert split_names(DataConfig(val_split="test"), "val")[:2] == ("test", "val")
    assert split_names(DataConfig(val_split="holdout"), "val") == ("holdout",)
    # A folder is never both splits.
    assert "test" not in split_names(DataConfig(train_split="test"), "val")


@pytest.mark.parametrize(
    "folders",
    [("train2017", "val2017"), ("train_images", "test_images"), ("trainset", "testset"),
     ("Train Data", "eval"), ("test-images",), ("Testing",), ("images.train", "images.dev")],
)  # fmt: skip
def test_folders_that_look_like_splits_are_refused_with_both_keys(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    sentence = refusal(folder(make(tmp_path, *folders)))
    assert "--data.train_split" in sentence
    assert "--data.val_split" in sentence
    assert all(each in sentence for each in folders)


@pytest.mark.parametrize(
    "classes", [("train station", "airport"), ("cat", "dog"), ("bus", "valley"), ("0", "1")]
)
def test_classes_are_not_taken_for_splits(tmp_path: Path, classes: tuple[str, ...]) -> None:
    assert not looks_split(classes)
    assert list(open_dataset(folder(make(tmp_path, *classes)), "train").classes) == sorted(classes)


@pytest.mark.parametrize("inner", [("train", "test"), ("Training", "Validation")])
def test_splits_below_the_first_folders_are_refused(tmp_path: Path, inner: tuple[str, str]) -> None:
    """A dataset unpacked into a folder of its own, and one with splits in each class."""
    make(tmp_path, *(f"archive/{split}" for split in inner))
    sentence = refusal(folder(tmp_path))
    assert f"archive/{inner[0]}, archive/{inner[1]}" in sentence
    assert f"--data.root {tmp_path / 'archive'}" in sentence
    assert len(open_dataset(folder(tmp_path / "archive"), "train")) == 4
    make(tmp_path / "twice", *(f"archive/set/{split}" for split in inner))
    assert f"--data.root {tmp_path / 'twice/archive/set'}" in refusal(folder(tmp_path / "twice"))
    for name in ("bottle", "cable"):
        make(tmp_path / "classes", *(f"{name}/{split}" for split in inner))
    assert "split folders inside" in refusal(folder(tmp_path / "classes"))


def test_a_dot_names_the_root_itself(tmp_path: Path) -> None:
    config = folder(make(tmp_path, "a", "b", per_class=3), val_split=".")
    assert len(open_dataset(config, "val")) == 12
    nothing_split = folder(tmp_path, ".", ".")
    assert split_folder(nothing_split, "train") is None
    assert len(open_dataset(nothing_split, "val")) == 2
