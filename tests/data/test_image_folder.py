"""Roots, splits and file names of image folders."""

from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.config.schema import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.layout import data_root, split_name
from mae_et.errors import Unreadable


def test_root_and_split_names_come_from_the_config(tmp_path: Path) -> None:
    config = DataConfig(root=tmp_path, val_split="test")
    assert data_root(config) == tmp_path
    assert [split_name(config, "train"), split_name(config, "val")] == ["train", "test"]
    with pytest.raises(UserError, match="not a folder"):
        data_root(DataConfig(root=tmp_path / "gone"))


def test_control_characters_in_image_names_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "red\x1b[31m\nline.png").write_bytes(b"")
    source = open_dataset(DataConfig(root=tmp_path / "..", train_split=tmp_path.name), "train")
    with pytest.raises(Unreadable, match=r"red\?\[31m\?line\.png: the file is empty$"):
        source[0]
