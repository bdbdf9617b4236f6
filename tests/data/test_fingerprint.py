"""Fingerprints, which checkpoints and feature files record, never change."""

from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import write_files, write_shard

from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.fingerprint import fingerprint, fingerprint_with_contents
from mae_et.data.prepare import prepare

# As files of any encoder would not be: four pixels, and their header.
PIXELS = {f"{name}/{i}.ppm": b"P6 2 2 255\n" + bytes([i] * 12) for name in "ab" for i in range(9)}


def folder(root: Path) -> DataConfig:
    write_files(root / "train", PIXELS)
    return DataConfig(root=root)


def shards(root: Path) -> DataConfig:
    source = folder(root / "files")
    prepare(PrepareConfig(root / "shards", source, splits=("train",), shard_images=7))
    return DataConfig(name="shards", root=root / "shards")


def wds(root: Path) -> DataConfig:
    for name in "ab":
        files = {path[2:]: data for path, data in PIXELS.items() if path[0] == name}
        labels = {f"{i}.cls": name.encode() for i in range(9)}
        write_shard(root / "train" / f"{name}.tar", files | labels)
    return DataConfig(name="wds", root=root)


def hugging_face(root: Path) -> DataConfig:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    labels = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = {
        "image": [{"bytes": data, "path": None} for data in PIXELS.values()],
        "label": [0] * 9 + [1] * 9,
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(root)
    return DataConfig(name=f"hfds/{root}")


def synthetic(root: Path) -> DataConfig:
    return DataConfig(synthetic_size=16, synthetic_train=18)


@pytest.mark.parametrize(
    ("kind", "names", "contents"),
    [
        (folder, "9725950912492729", "e027b6bf53faefa8"),
        (shards, "b412837af38559d6", "575e32f2b82786d1"),
        (wds, "810fdf3e0b43192a", "413045c0ec76ebf8"),
        (hugging_face, "0269f4272641ab0e", "714c3a3a2836dcbe"),
        (synthetic, "add2954b56d56bc3", None),
    ],
)
def test_fingerprints_of_every_kind_of_dataset_stay(
    kind: Callable[[Path], DataConfig], names: str, contents: str | None, tmp_path: Path
) -> None:
    source = open_dataset(kind(tmp_path / "data"), "train")
    assert len(source) == 18
    assert fingerprint(source)[:16] == names
    if contents is not None:  # rendered with libraries whose last digits may change
        assert fingerprint_with_contents(source)[:16] == contents
