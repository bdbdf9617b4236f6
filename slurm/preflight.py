"""What a job would refuse its data for, as far as the machine that submits it can see."""

import os
import sys
from pathlib import Path

from mae_et.config.schema import DataConfig
from mae_et.data.layout import EXTENSIONS, data_root, split_name
from mae_et.errors import UserError

# Sources that are nothing without data.root.
ROOTED = ("folder", "shards", "wds")


def check_root(data: DataConfig) -> None:
    """Refuse data whose root is not given, and tell of a root that is not seen from here.

    Raises:
        UserError: the sentence that the run would end with.
    """
    if data.root is None:
        if data.source in ROOTED:
            data_root(data)
    elif not data.root.exists():
        # Not refused: the machines of a cluster may have disks that this one has not.
        print(f"mae-et: warning: {data.root} is not seen from this machine", file=sys.stderr)


def check_classes(data: DataConfig) -> None:
    """Refuse a folder whose splits are not sorted into class folders; list nothing below them.

    Pre-training reads no labels, so it would end well, and what follows it would not.

    Raises:
        UserError: a split is missing, has an image beside the class folders, or fewer than two.
    """
    root = data.root
    if data.source != "folder" or root is None or not root.is_dir():
        return
    splits = {split: root / split_name(data, split) for split in ("train", "val")}
    if not any(top.is_dir() for top in splits.values()):
        splits = {"train": root}  # of which a fifth of each class is held out
    for split, top in splits.items():
        where = f"the {split} split of data.root {root}"
        if not top.is_dir():
            raise UserError(f"--then: {where} is missing: there is no folder {top.name} in it")
        folders, image = _entries(top)
        cause = ""
        if image:
            cause = f"{image} lies in no class folder"
        elif folders < 2:
            cause = f"{top} has fewer than two class folders"
        if cause:
            raise UserError(
                f"--then: {where} has no classes, for {cause}; pre-training would not notice, but "
                f"what follows needs {top.name}/CLASS/*"
            )


def _entries(top: Path) -> tuple[int, str]:
    """Return how many folders lie in one, and the name of an image that does."""
    folders, image = 0, ""
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders += 1
            elif entry.name.lower().endswith(EXTENSIONS):
                image = entry.name
    return folders, image
