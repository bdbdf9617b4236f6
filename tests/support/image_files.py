"""Small images, folders and shards of them, and how they are read or refused."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_et.config.data import DataConfig
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.data.layout import Split
from mae_et.errors import UserError


def small_image(value: int) -> Image.Image:
    return Image.new("L", (6, 4), value).convert("RGB")


def save(path: Path, value: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small_image(value).save(path, **options)
    return path


def encoded(value: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    small_image(value).save(file, kind)
    return file.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by their paths in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def folder(root: Path, train_split: str = "train", val_split: str = "val") -> DataConfig:
    return DataConfig(root=root, train_split=train_split, val_split=val_split)


def values(source: ImageDataset) -> list[tuple[int, int]]:
    """Return each image's first grey value, and its label."""
    found = []
    for i in range(len(source)):
        image, label = source[i]
        assert isinstance(image, Image.Image)
        found.append((image.convert("L").getpixel((0, 0)), label))
    return found  # type: ignore[return-value]


def refusal(config: DataConfig, split: Split = "train", channels: int = 3) -> str:
    """Return the one sentence in which a dataset is refused."""
    with pytest.raises(UserError) as raised:
        open_dataset(config, split, channels)
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return path


def shards(root: Path, **splits: str) -> DataConfig:
    return DataConfig(name="wds", root=root, **splits)  # type: ignore[arg-type]
