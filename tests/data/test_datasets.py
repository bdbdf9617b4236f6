"""torchvision's datasets and the synthetic one open by name."""

import inspect
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from image_files import refusal, save, values
from PIL import Image

import mae_et.data.datasets as sources
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.images.channels import PIL_MODES
from mae_et.data.sources.synthetic import CLASSES
from mae_et.errors import RunFailed


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
    described = inspect.getsource(DataConfig).partition("root: Path")[0]  # the help of data.name
    assert set(sources.KINDS) > {"folder", "synthetic", *sources.TORCHVISION, "wds", "hfds/NAME"}
    for known in sources.KINDS:
        assert known in sentence
        assert known in described
    assert "data.synthetic_train" in refusal(DataConfig(synthetic_train=0))
