"""Check a job's data before submission, as far as the submitting machine has access."""

import os
from pathlib import Path

from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.data.layout import EXTENSIONS, ROOTED, data_root, is_folder, split_folder
from mae_et.errors import UserError
from mae_et.io.plain_files import read_mapping
from mae_et.runtime.console import say
from mae_et.training.plan import curriculum_of


def check_root(data: DataConfig) -> None:
    """Refuse data without a required data.root; warn if it does not exist on this machine.

    Raises:
        UserError: the error with which the run would fail.
    """
    if data.root is None:
        if data.source in ROOTED:
            data_root(data)
    elif not data.root.exists():
        # Not an error: compute nodes may have disks that the login node lacks.
        say(f"warning: {data.root} does not exist on this machine")


def check_start(start: Path | None) -> None:
    """Warn if the checkpoint that a command starts from does not exist."""
    if start is not None and not start.exists():
        # Not an error: it may be on a disk of the compute nodes.
        say(
            f"warning: {start} does not exist on this machine, which is fine for the name of a "
            "timm model; if another job writes it, wait for that job with --dependency afterok:JOB"
        )


def check_plan(config: PretrainConfig) -> None:
    """Refuse an impossible curriculum, or an impossible plan if the number of images is known.

    Folders are not listed, and costs are counted by area, which does not require PyTorch.

    Raises:
        UserError: the error with which the run would fail.
    """
    curriculum, images = curriculum_of(config), _known_images(config.data)
    if images is not None and config.init.extends is None:
        curriculum.plan(config.curriculum.epochs, images, config.optim.batch_size)


def _known_images(data: DataConfig) -> int | None:
    """Return the number of training images if a config or a prepared split states it."""
    if data.source == "synthetic":
        return data.synthetic_train
    split = data.root / "train" / "split.json" if data.source == "shards" and data.root else None
    found = read_mapping(split).get("images") if split is not None and split.is_file() else None
    return found if isinstance(found, int) else None


def check_classes(data: DataConfig) -> None:
    """Refuse a folder whose splits are not sorted into class folders, without listing the images.

    Pre-training does not read labels, so it would succeed, and only its follow-up would fail.

    Raises:
        UserError: a split is missing, has images beside its class folders, or has fewer than two
            class folders.
    """
    root = data.root
    if data.source != "folder" or root is None or not root.is_dir():
        return
    for split in ("train", "val"):
        # Without split folders, a fifth of each class of the root is held out.
        top = split_folder(data, split) or root
        where = f"the {split} split of data.root {root}"
        folders, image = _entries(top)
        cause = ""
        if image:
            cause = f"{image} is in no class folder"
        elif folders < 2:
            cause = f"{top} has fewer than two class folders"
        if cause:
            raise UserError(
                f"--then: {where} has no classes ({cause}); pre-training needs none, but its "
                f"follow-up needs {top.name}/CLASS/*"
            )


def _entries(top: Path) -> tuple[int, str]:
    """Return the number of subfolders, and the name of an image beside them, if any."""
    folders, image = 0, ""
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                folders += 1
            elif entry.name.lower().endswith(EXTENSIONS):
                image = entry.name
    return folders, image
