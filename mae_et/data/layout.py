"""Where a config's images lie on disk: root, names of the splits, file endings.

It imports no PyTorch, for `mae-et submit` checks these too.
"""

from pathlib import Path
from typing import Literal

from mae_et.config.schema import DataConfig
from mae_et.errors import UserError

Split = Literal["train", "val"]

ARRAYS = (".npy",)
EXTENSIONS = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp", *ARRAYS,
)  # fmt: skip


def data_root(config: DataConfig) -> Path:
    """Return the folder that a config names.

    Raises:
        UserError: it names none, or there is no such folder.
    """
    if config.root is None:
        raise UserError(f"data.root is needed for data.name {config.source}")
    if not config.root.is_dir():
        raise UserError(f"data.root {config.root} is not a folder")
    return config.root


def split_name(config: DataConfig, split: Split) -> str:
    """Return what a config calls a split."""
    return config.train_split if split == "train" else config.val_split
