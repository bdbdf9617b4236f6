"""Datasets of torchvision, Hugging Face and the embedded one open by name."""

import importlib.util
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_files import refusal, save, values
from PIL import Image

import mae_et.data.datasets as sources
from mae_et.config.data import DataConfig
from mae_et.data.channels import PIL_MODES
from mae_et.data.datasets import count_unlabelled, open_dataset
from mae_et.data.synthetic import CLASSES
from mae_et.errors import RunFailed

# --- torchvision's sets ---


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("<urlopen error\nno network>")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_cifar(root: Path, hundred: bool) -> None:
    """Write files in the format of CIFAR's archive for Python, with 2 images a batch."""
    top = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    top.mkdir(parents=True)
    batches = (
        ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    )
    for number, name in enumerate(batches):
        data = np.full((2, 3072), number, np.uint8)
        data[:, 0] = 200 + number  # red of the first pixel: planes, not pixels, are in a row
        labels = {"fine_labels" if hundred else "labels": [number, 9]}
        (top / name).write_bytes(pickle.dumps({"data": data, **labels}))
    names = [f"class {i}" for i in range(100 if hundred else 10)]
    meta = {"fine_label_names" if hundred else "label_names": names}
    (top / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cifar_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None, name: str, channels: int
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar(tmp_path, hundred=name == "cifar100")
    config = DataConfig(name=name, root=tmp_path)
    train, val = (open_dataset(config, split, channels) for split in ("train", "val"))
    assert len(train.classes) == (100 if name == "cifar100" else 10)
    assert train.classes[1] == "class 1"
    last = 1 if name == "cifar100" else 5  # number of the test batch
    assert (len(train), len(val)) == (2 * last, 2)
    assert [val[i][1] for i in range(2)] == [last, 9]
    image, _ = val[0]
    assert isinstance(image, Image.Image)
    expected = Image.new("RGB", (32, 32), (last, last, last))
    expected.putpixel((0, 0), (200 + last, last, last))
    assert image.tobytes() == expected.convert(PIL_MODES[channels]).tobytes()


def write_imagenette(top: Path) -> None:
    for split, count in (("train", 2), ("val", 1)):
        for label, wnid in enumerate(("n01440764", "n02102040", "n02979186")):
            for i in range(count):
                save(top / f"imagenette2/{split}/{wnid}/{wnid}_{i}.JPEG", 40 * label)


def test_an_existing_dataset_is_not_downloaded_again(tmp_path: Path, offline: None) -> None:
    write_imagenette(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config = DataConfig(name="imagenette", root=tmp_path)
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert list(train.classes) == ["tench", "English springer", "cassette player"]
    assert values(val) == [(0, 0), (40, 1), (80, 2)]
    assert [label for _, label in values(train)] == [0, 0, 1, 1, 2, 2]
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "imagenette2/val/n01440764/n01440764_0.JPEG").write_bytes(b"noise")
    with pytest.raises(RunFailed, match="0 of imagenette"):
        val[0]


def test_concurrent_ranks_download_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    downloads = []

    def download(url: str, root: str, **_: object) -> None:
        downloads.append(url)
        print("downloading")
        write_imagenette(Path(root))

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", download)
    lengths: list[int] = []
    config = DataConfig(name="imagenette", root=tmp_path / "new")
    threads = [
        threading.Thread(target=lambda: lengths.append(len(open_dataset(config, "train"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [6, 6, 6]
    assert len(downloads) == 1
    assert [path.name for path in (tmp_path / "new").glob("[!.]*")] == ["imagenette2"]
    assert capfd.readouterr().out == ""  # which is kept for results


def test_an_interrupted_download_is_not_taken_for_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, root: str, **_: object) -> None:
        save(Path(root) / "imagenette2/train/n01440764/0.JPEG")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", download)
    config = DataConfig(name="imagenette", root=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        open_dataset(config, "train")
    assert list(tmp_path.glob("[!.]*")) == []


@pytest.mark.parametrize("name", sources.TORCHVISION)
def test_a_failed_download_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refusal(DataConfig(name=name))
    assert f"the dataset {name} is not in data/{name} and cannot be downloaded" in sentence
    assert "no network" in sentence
    elsewhere = DataConfig(name=name, root=tmp_path / "elsewhere", download=False)
    assert "data.download is off" in refusal(elsewhere)
    assert not (tmp_path / "elsewhere").exists()


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="the package datasets is not installed (extra hf)",
)


def test_a_missing_datasets_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "'.[hf]'" in refusal(DataConfig(name="hfds/cifar10"))


@pytest.fixture
def hugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """Return a function that names a local folder as a Hugging Face dataset."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def name(folder: str, **splits: str) -> DataConfig:
        return DataConfig(f"hfds/{tmp_path / folder}", tmp_path / "cache", **splits)  # type: ignore[arg-type]

    return name


@needs_datasets
def test_a_local_hugging_face_dataset_has_images_labels_and_classes(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    for value, place in enumerate(("train/Cat", "train/Dog", "validation/Cat", "validation/Dog")):
        save(tmp_path / "Set" / place / "0.png", value)
    train, val = (open_dataset(hugging("Set"), split) for split in ("train", "val"))
    assert list(train.classes) == list(val.classes) == ["Cat", "Dog"]
    assert values(train) == [(0, 0), (1, 1)]
    assert values(val) == [(2, 0), (3, 1)]
    assert values(pickle.loads(pickle.dumps(val))) == values(val)
    image, _ = open_dataset(hugging("Set", val_split="train"), "val", 1)[1]
    assert np.asarray(image).tolist() == [[1] * 6] * 4


@needs_datasets
def test_a_hugging_face_dataset_without_labels_is_unlabelled(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    for i in range(3):
        save(tmp_path / f"Flat/{i}.png", i)
    source = open_dataset(hugging("Flat"), "train")
    assert list(source.classes) == []
    assert values(source) == [(0, -1), (1, -1), (2, -1)]


@needs_datasets
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


@needs_datasets
def test_unlabelled_images_of_a_hugging_face_dataset_are_counted(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    import datasets

    save(tmp_path / "0.png", 7)
    image = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["Cat", "Dog"])}
    )
    rows = datasets.Dataset.from_dict({"image": [image] * 4, "label": [0, -1, None, 1]}, features)
    (tmp_path / "Set").mkdir()
    rows.to_parquet(tmp_path / "Set" / "train.parquet")
    source = open_dataset(hugging("Set"), "train")
    assert [label for _, label in values(source)] == [0, -1, -1, 1]
    assert count_unlabelled(source) == 2


@needs_datasets
@pytest.mark.parametrize(
    ("columns", "classes", "labels", "report"),
    [
        ({"img": "image", "label": ["Dog", "Cat"]}, ["Dog", "Cat"], [1, 0], "column img"),
        ({"img": "image", "coarse": ["pet"], "fine_label": ["Dog", "Cat"]}, ["Dog", "Cat"], [1, 0],
         "images from the column img, labels from the column fine_label"),
        ({"image": "image", "label": "int64"}, ["0", "1"], [1, 0], ""),
        ({"image": "image", "label": "string"}, ["a", "b"], [1, 0], ""),
        ({"image": "image", "height": "int64"}, [], [-1, -1], ""),
    ],
)  # fmt: skip
def test_columns_of_a_hugging_face_dataset_are_found_and_reported(
    columns: dict, classes, labels, report: str, tmp_path: Path, hugging, capsys
) -> None:
    """As CIFAR-10 has them on the hub, CIFAR-100, a Parquet file of one's own, and no labels."""
    import datasets

    save(tmp_path / "0.png", 7)
    image = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    kinds = {
        name: datasets.Image() if kind == "image" else datasets.Value(kind)
        if isinstance(kind, str) else datasets.ClassLabel(names=kind)
        for name, kind in columns.items()
    }  # fmt: skip
    cells = {"image": [image] * 2, "int64": [1, 0], "string": ["b", "a"]}
    table = {
        name: [0, 0] if kind == ["pet"] else cells.get(str(kind), [1, 0])
        for name, kind in columns.items()
    }
    (tmp_path / "Set").mkdir()
    for split, part in (("train", slice(None)), ("test", slice(1))):
        rows = {name: values[part] for name, values in table.items()}
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(
            tmp_path / "Set" / f"{split}.parquet"
        )
    train, val = (open_dataset(hugging("Set"), split) for split in ("train", "val"))
    assert list(train.classes) == classes
    assert [label for _, label in values(train)] == list(train.inner.labels) == labels
    assert [label for _, label in values(val)] == labels[:1]
    assert report in capsys.readouterr().err


@needs_datasets
def test_columns_that_cannot_be_used_are_refused(tmp_path: Path, hugging) -> None:
    import datasets

    save(tmp_path / "0.png", 7)
    image = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    for name, kinds, row, sentence in (
        ("two", {"a": datasets.Image(), "b": datasets.Image()}, {"a": image, "b": image},
         "several columns hold images, and none is called image: a, b"),
        ("ids", {"image": datasets.Image(), "label": datasets.Value("int64")},
         {"image": image, "label": 10**9}, "the column label holds no classes"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        rows = {column: [cell] for column, cell in row.items()}
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(
            tmp_path / name / "train.parquet"
        )
        assert sentence in refusal(hugging(name))


@needs_datasets
def test_a_hugging_face_dataset_of_12_bits_is_warned_of_and_scaled(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    for name in ("Cat", "Dog"):
        path = tmp_path / "Set" / "train" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((4, 6), 4095, np.uint16)).save(path)
    with pytest.warns(UserWarning, match=r"reach 4095 of 65535.*data\.max_value 4095"):
        open_dataset(hugging("Set"), "train", 1)
    image, _ = open_dataset(replace(hugging("Set"), max_value=4095), "train", 1)[0]
    assert np.asarray(image).min() == 255


@needs_datasets
def test_a_hugging_face_dataset_saved_without_splits_is_the_training_split(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    import datasets

    rows = {"image": [Image.new("RGB", (6, 4), (i,) * 3) for i in range(2)], "label": ["b", "a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "Set")
    assert values(open_dataset(hugging("Set"), "train")) == [(0, 1), (1, 0)]
    assert "it is one split; save a DatasetDict" in refusal(hugging("Set"), "val")


@needs_datasets
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


@needs_datasets
@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_hugging_face_val_split_may_have_its_usual_names(
    tmp_path: Path, hugging: Callable[..., DataConfig], name: str, capsys
) -> None:
    for value, split in enumerate(("train", name)):
        for label in ("Cat", "Dog"):
            save(tmp_path / f"Set/{split}/{label}/0.png", value)
    assert values(open_dataset(hugging("Set"), "val")) == [(1, 0), (1, 1)]
    assert f"the split is {name}" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_synthetic_splits_are_disjoint_in_any_mode(channels: int) -> None:
    config = DataConfig(synthetic_size=16, synthetic_train=12, synthetic_val=5)
    train, val = (open_dataset(config, split, channels) for split in ("train", "val"))
    longer = open_dataset(DataConfig(synthetic_size=16, synthetic_train=17), "train", channels)
    assert (len(train), len(val)) == (12, 5)
    assert tuple(train.classes) == tuple(CLASSES)
    for i in range(17):
        image, label = train[i] if i < 12 else val[i - 12]
        assert isinstance(image, Image.Image)
        assert image.mode == PIL_MODES[channels]
        assert label == i % 10
        assert image.tobytes() == longer[i][0].tobytes()  # type: ignore[union-attr]


def test_an_unknown_dataset_is_refused_with_the_known_ones() -> None:
    sentence = refusal(DataConfig(name="imagenet"))
    for known in ("folder", "synthetic", *sources.TORCHVISION, "wds", "hfds/NAME"):
        assert known in sentence
    assert "data.synthetic_train" in refusal(DataConfig(synthetic_train=0))
