"""Check a job's folder, model, checkpoint and data before submission, where this machine can."""

import os
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import get_args

from finetune.config import ClassifierConfig
from finetune.run_folder import (
    check_scored_data,
    check_training_data,
    data_to_evaluate,
    read_classifier_config,
)
from finetune.scoring_config import EvaluateConfig, ProbeConfig
from mae_et.checkpoints.run_config import config_of_run
from mae_et.config.data import DataConfig
from mae_et.config.model_names import check_model
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.curriculum.mae_cost import ENCODERS
from mae_et.curriculum.plan import check_replay
from mae_et.curriculum.schedule import check_batch
from mae_et.data.datasets import kind_of, open_dataset
from mae_et.data.layout import EXTENSIONS, Split, data_root, is_folder, split_folder
from mae_et.data.sources.file_lists import read_file_list
from mae_et.errors import UserError
from mae_et.io.lock import check_writable
from mae_et.io.plain_files import read_mapping
from mae_et.runtime.console import say
from mae_et.training.plan import curriculum_of, micro_batch_size
from slurm.events import events_file

LISTING_SECONDS = 5.0
_COUNTED: dict[str, int | None] = {}
"""Images by the config of their data, which the runs of a sweep share."""


def check_path(root: Path) -> None:
    """Refuse a run folder whose path would be misread in a batch script or in PYTHONPATH."""
    path = str(root.absolute())
    strange = sorted({each for each in path if each in ":\\'\"" or not each.isprintable()})
    if strange:
        raise UserError(
            f"the path of the run folder {path!r} contains {' '.join(map(repr, strange))}, which "
            "SLURM or Python would misread"
        )


def check_folder(folder: Path, dry_run: bool) -> None:
    """Refuse a run folder that cannot be written to; a dry run does not create it."""
    if "%" in str(folder.absolute()):
        raise UserError(f"the run folder {folder} contains %, which SLURM would replace")
    if dry_run:
        there = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
        )
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UserError(f"the run folder {folder} cannot be written to: see {there}")
        return
    check_writable(folder)


def check_root(data: DataConfig) -> None:
    """Refuse unknown data, or data without a required data.root; warn if this machine lacks it.

    Jobs start in the current folder, so a relative data.root is there or wrong.
    """
    kind = kind_of(data)
    root = data.root
    if root is None or root.is_file() or not (root.is_absolute() or root.exists()):
        if kind.rooted:
            data_root(data)
    elif not root.exists():
        # Not an error: compute nodes may have disks that the login node lacks.
        say(f"warning: {root} does not exist on this machine")
    elif _is_empty(root):
        say(f"warning: {root} is empty on this machine")


def _is_empty(root: Path) -> bool:
    """Return whether a folder is empty, as the mount point of a disk that is not mounted."""
    return root.is_dir() and not any(root.iterdir())


def check_start(start: Path | None) -> None:
    """Warn if the checkpoint that a command starts from does not exist."""
    if start is not None and not start.exists():
        # Not an error: it may be on a disk of the compute nodes.
        say(
            f"warning: {start} does not exist on this machine, which is fine for the name of a "
            "timm model; if another job writes it, wait for that job with --dependency afterok:JOB"
        )


def check_plan(config: PretrainConfig, ranks: int, may_wait: bool) -> None:
    """Refuse an impossible curriculum, or an impossible plan if the number of images is known.

    Costs are counted by area, which does not require PyTorch. `may_wait`: the job may wait for
    another one that writes its images.
    """
    curriculum, data = curriculum_of(config), config.data
    images = _known_images(data, config.model.channels, may_wait)
    if images is not None and config.continues is None:
        plan = curriculum.plan(config.curriculum.epochs, images, config.optim.batch_size)
        micro_batch_size(config.efficiency.micro_batch, plan, ranks)
        check_replay(plan, data.replay or {}, ranks)


def _known_images(data: DataConfig, channels: int, may_wait: bool) -> int | None:
    """Return the number of training images, if it is stated or quickly counted."""
    if data.source == "synthetic":
        return data.synthetic_train
    if data.source == "folder":
        root = data.root
        is_here = root is not None and root.exists() and not _is_empty(root)
        return _count_in_time(data, channels) if is_here and not may_wait else None
    split = data.root / "train" / "split.json" if data.source == "shards" and data.root else None
    found = read_mapping(split).get("images") if split is not None and split.is_file() else None
    return found if isinstance(found, int) else None


def _count_in_time(data: DataConfig, channels: int) -> int | None:
    """Open a folder of images as the run will; None if listing it takes long."""
    if repr(data) not in _COUNTED:
        found: Future[int] = Future()

        def count() -> None:
            try:
                found.set_result(len(open_dataset(data, "train", channels)))
            except BaseException as error:
                found.set_exception(error)

        Thread(target=count, daemon=True).start()  # is left alone after a timeout
        try:
            _COUNTED[repr(data)] = found.result(LISTING_SECONDS)
        except TimeoutError:
            _COUNTED[repr(data)] = None
            say(
                f"{data.root} was not listed in {LISTING_SECONDS:g} s: the plan is not checked "
                "against the number of its images"
            )
    return _COUNTED[repr(data)]


def check_model_name(config: RunConfig) -> None:
    """Refuse an encoder or a backbone that timm does not know."""
    for key in ("encoder", "backbone"):
        name = getattr(config.model, key, None)
        if name is not None and name not in ENCODERS:  # timm's, and no import takes seconds
            check_model(f"model.{key}", name)


def check_scoring(kind: str, config: ProbeConfig | EvaluateConfig) -> None:
    """Refuse a run that cannot be scored, and a folder of images without labels.

    Other checkpoints are not read, since they may be large, or another job may write them, as it
    may finish a run.
    """
    check_scored_data(config)
    folder = config.checkpoint
    run: RunConfig | None = None
    if not _is_unfinished(folder):
        classifier = read_classifier_config(folder)
        if isinstance(config, EvaluateConfig) and folder.exists():
            data_to_evaluate(config, classifier)
        run = classifier or config_of_run(folder)
    data = config.data or (run.data if run else None)
    if data is not None and data.root is not None:
        check_root(data)
        check_classes(data, kind)


def _is_unfinished(folder: Path) -> bool:
    """Return whether a folder is that of a run that may become a classifier's."""
    files = (folder / "config.yaml", events_file(folder))
    if (folder / "results.json").exists() or not any(file.exists() for file in files):
        return False
    try:
        return config_of_run(folder) is None
    except UserError:  # the config of a classifier
        return True


def check_classifier(kind: str, config: ClassifierConfig, may_wait: bool) -> None:
    """Refuse fine-tuning without data, images without labels, and a batch larger than the dataset.

    `may_wait`: see `check_plan`.
    """
    if kind == "finetune":
        check_training_data(config, may_wait=True)
    check_classes(config.data, kind)
    images = _known_images(config.data, config.model.channels, may_wait)
    if images is not None:
        check_batch(config.optim.batch_size, images)


def check_classes(data: DataConfig, kind: str) -> None:
    """Refuse a folder whose splits are not sorted into class folders, without listing the images.

    `kind` is the name of the command that needs classes, for errors.
    """
    root = data.root
    if data.source != "folder" or root is None or not root.exists() or _is_empty(root):
        return
    for split in ("val",) if kind == "evaluate" else get_args(Split):
        # Without split folders, a fifth of each class of the root is held out.
        top = split_folder(data, split) or root
        cause = ""
        folders, image = (0, "") if top.is_file() else _entries(top)
        if top.is_file():
            few = len(read_file_list(top).classes) < 2
            cause = f"{top} gives fewer than two labels" if few else ""
        elif image:
            cause = f"{image} is in no class folder"
        elif folders < 2:
            cause = f"{top} has fewer than two class folders"
        if cause:
            raise UserError(
                f"the {split} split of data.root {root} has no classes ({cause}): {kind} needs "
                f"{top.name}/CLASS/*, or a list with labels (docs/datasets.md)"
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
