"""Datasets of the Hugging Face library open by name, with their labels and classes."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, refusal, save, values
from PIL import Image

from mae_et.config.data import DataConfig
from mae_et.data.datasets import count_unlabelled, open_dataset
from mae_et.errors import RunFailed, Unreadable


def test_a_missing_datasets_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "'.[hf]'" in refusal(DataConfig(name="hfds/cifar10"))


@pytest.fixture
def hugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """Return a function that names a local folder as a Hugging Face dataset."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def name(folder: str, **splits: str) -> DataConfig:
        return DataConfig(f"hfds/{tmp_path / folder}", tmp_path / "cache", **splits)  # type: ignore[arg-type]

    return name


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., None]:
    """Return a function that writes a split: columns of images, of a dtype, or of named classes."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")

    def kind_of(kind: str | list[str]) -> object:
        if isinstance(kind, list):
            return datasets.ClassLabel(names=kind)
        return datasets.Image() if kind == "image" else datasets.Value(kind)

    def write(path: str, kinds: dict, rows: dict) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        features = datasets.Features({name: kind_of(kind) for name, kind in kinds.items()})
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / path)

    return write


IMAGE = {"bytes": encoded(7), "path": None}


def test_a_local_hugging_face_dataset_has_images_labels_and_classes(
    tmp_path: Path, hugging: Callable[..., DataConfig], capsys
) -> None:
    for value, place in enumerate(("train/Cat", "train/Dog", "validation/Cat", "validation/Dog")):
        save(tmp_path / "Set" / place / "0.png", value)
    train, val = (open_dataset(hugging("Set"), split) for split in ("train", "val"))
    assert "the split is validation" in capsys.readouterr().err
    assert list(train.classes) == list(val.classes) == ["Cat", "Dog"]
    assert values(train) == [(0, 0), (1, 1)]
    assert values(val) == [(2, 0), (3, 1)]
    assert values(pickle.loads(pickle.dumps(val))) == values(val)
    image, _ = open_dataset(hugging("Set", val_split="train"), "val", 1)[1]
    assert np.asarray(image).tolist() == [[1] * 6] * 4


def test_hugging_face_errors_are_one_sentence(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    save(tmp_path / "Set/train/Cat/0.png")
    (tmp_path / "Set/train/Cat/1.png").write_bytes(b"noise")
    assert "data.val_split val" in refusal(hugging("Set"), "val")
    assert "data.val_split other" in refusal(hugging("Set", val_split="other"), "val")
    assert "cannot be opened" in refusal(hugging("Missing"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.csv").write_text("a,b\n1,2\n")
    assert "no column holds images: a, b" in refusal(hugging("text"))
    source = open_dataset(hugging("Set"), "train")
    with pytest.raises(RunFailed, match=r"1 of hfds/.*: it is neither an image"):
        source[1]  # and not another sample in its place


def test_unlabelled_images_of_a_hugging_face_dataset_are_counted(hugging, parquet) -> None:
    kinds = {"image": "image", "label": ["Cat", "Dog"]}
    parquet("Set/train.parquet", kinds, {"image": [IMAGE] * 4, "label": [0, -1, None, 1]})
    source = open_dataset(hugging("Set"), "train")
    assert [label for _, label in values(source)] == [0, -1, -1, 1]
    assert count_unlabelled(source) == 2


@pytest.mark.parametrize(
    ("columns", "classes", "labels", "report"),
    [
        ({"img": "image", "label": ["Dog", "Cat"]}, ["Dog", "Cat"], [1, 0], "column img"),
        ({"img": "image", "coarse": ["pet"], "fine_label": ["Dog", "Cat"]}, ["Dog", "Cat"], [1, 0],
         "images from the column img, labels from the column fine_label"),
        ({"image": "image", "label": "int64"}, ["0", "1"], [1, 0], ""),
        ({"image": "image", "label": "string"}, ["a", "b"], [1, 0], ""),
        ({"image": "image", "label": "large_string"}, ["a", "b"], [1, 0], ""),
        ({"image": "image", "label": "bool"}, ["0", "1"], [1, 0], ""),
        ({"image": "image", "label": "float64", "height": "int64"}, [], [-1, -1],
         "no class labels in the columns label (float64), height (int64)"),
    ],
)  # fmt: skip
def test_columns_of_a_hugging_face_dataset_are_found_and_reported(
    columns: dict, classes, labels, report: str, hugging, parquet, capsys
) -> None:
    """As CIFAR-10 has them on the hub, CIFAR-100, a Parquet file of one's own, and no labels."""
    cells = {"image": [IMAGE] * 2, "['pet']": [0, 0]}
    cells |= {key: ["b", "a"] for key in ("string", "large_string")}
    table = {name: cells.get(str(kind), [1, 0]) for name, kind in columns.items()}
    parquet("Set/train.parquet", columns, table)
    parquet("Set/test.parquet", columns, {name: cells[:1] for name, cells in table.items()})
    train, val = (open_dataset(hugging("Set"), split) for split in ("train", "val"))
    assert list(train.classes) == classes
    assert [label for _, label in values(train)] == list(train.inner.labels) == labels
    assert [label for _, label in values(val)] == labels[:1]
    assert report in capsys.readouterr().err


def test_columns_that_cannot_be_used_are_refused(hugging, parquet) -> None:
    parquet("two/train.parquet", {"a": "image", "b": "image"}, {"a": [IMAGE], "b": [IMAGE]})
    assert "several columns hold images, and none is called image: a, b" in refusal(hugging("two"))
    parquet("one/train.parquet", {"a": "image"}, {"a": [IMAGE, None]})
    source = open_dataset(hugging("one"), "train")
    with pytest.raises(Unreadable, match=r"image 1 of .*: its row has no a"):
        source[1]
    rows = {"image": [IMAGE], "label": [10**9]}
    parquet("ids/train.parquet", {"image": "image", "label": "int64"}, rows)
    assert "the column label holds no classes" in refusal(hugging("ids"))


def test_a_cache_inside_of_a_dataset_is_refused(hugging, parquet, tmp_path) -> None:
    """`datasets` would count the images that it cached there as further ones."""
    parquet("Set/test.parquet", {"image": "image"}, {"image": [IMAGE]})
    for inside in ("Set", "Set/cache"):
        data = replace(hugging("Set"), root=tmp_path / inside)
        assert "data.root, its cache, lies in it" in refusal(data, "val")


def test_a_hugging_face_dataset_saved_without_splits_is_the_training_split(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    import datasets

    rows = {"image": [Image.new("RGB", (6, 4), (i,) * 3) for i in range(2)], "label": ["b", "a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "Set")
    assert values(open_dataset(hugging("Set"), "train")) == [(0, 1), (1, 0)]
    assert "it is one split; save a DatasetDict" in refusal(hugging("Set"), "val")


def test_classes_of_a_saved_split_are_those_of_the_training_split(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    """As of splits that were encoded apart: `load_dataset` gives both the names of the first."""
    import datasets

    def rows(classes: list[str], *labels: int) -> datasets.Dataset:
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
        images = [Image.new("RGB", (6, 4), (i,) * 3) for i in range(len(labels))]
        columns = {"image": images, "label": labels}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    splits = {"train": rows(["a", "b", "c"], 0, 1, 2), "validation": rows(["c", "b"], 0, -1, 1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "Set")
    opened = open_dataset(hugging("Set"), "val")
    assert list(opened.classes) == ["a", "b", "c"]
    assert values(opened) == [(0, 2), (1, -1), (2, 1)]
    assert list(opened.inner.labels) == [2, -1, 1]
    splits["validation"] = rows(["d", "b"], 0)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "Other")
    assert "classes that the training split lacks: d" in refusal(hugging("Other"), "val")


def test_classes_of_a_parquet_split_are_those_of_its_files(hugging, parquet, tmp_path) -> None:
    """`load_dataset` gives all files the names of the first."""
    kinds = {"image": "image", "label": ["Dog", "Cat", "Owl"]}
    parquet("Set/train.parquet", kinds, {"image": [IMAGE] * 3, "label": [0, 1, 2]})
    rows = {"image": [IMAGE] * 3, "label": [0, 1, -1]}
    parquet("Set/test.parquet", kinds | {"label": ["Cat", "Dog"]}, rows)
    train, val = (open_dataset(hugging("Set"), split) for split in ("train", "val"))
    assert list(train.classes) == list(val.classes) == ["Dog", "Cat", "Owl"]
    assert [label for _, label in values(val)] == [1, 0, -1]
    for place in ("train-0", "train-1"):
        parquet(f"Two/data/{place}.parquet", kinds, rows)
        kinds |= {"label": ["Cat", "Dog"]}
    said = refusal(hugging("Two"))
    assert "its files record different classes: train-0.parquet has Dog, Cat, Owl, " in said
    import datasets

    saved = datasets.Dataset.from_parquet(str(tmp_path / "Set/test.parquet"))
    saved.save_to_disk(tmp_path / "Saved")
    assert list(open_dataset(hugging("Saved"), "train").classes) == ["Cat", "Dog"]


def test_the_classes_of_a_dataset_card_replace_those_of_the_files(
    hugging, parquet, tmp_path
) -> None:
    """As `load_dataset` reads them."""
    import datasets

    kinds = {"image": "image", "label": ["Dog", "Cat"]}
    parquet("Set/train.parquet", kinds, {"image": [IMAGE] * 2, "label": [0, 1]})
    parquet("Set/test.parquet", kinds | {"label": ["Cat", "Dog"]},
            {"image": [IMAGE] * 2, "label": [0, 1]})  # fmt: skip
    names = datasets.ClassLabel(names=["Hund", "Katze"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    about = datasets.DatasetInfo(features=features)
    datasets.info.DatasetInfosDict({"default": about}).write_to_directory(str(tmp_path / "Set"))
    for split in ("train", "val"):
        found = open_dataset(hugging("Set"), split)
        assert list(found.classes) == ["Hund", "Katze"]
        assert [label for _, label in values(found)] == [0, 1]
