"""Find a dataset's files on disk: its root, split folders and file extensions.

It does not import PyTorch, so that `mae-et submit` can run the same checks.
"""

import contextlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args

from mae_et.config.data import DataConfig
from mae_et.errors import UserError, listed

Split = Literal["train", "val"]

ARRAYS = (".npy",)
EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp", *ARRAYS,
)  # fmt: skip
"""Files to read; their format is recognised by content (see `decoding.FORMATS`)."""

LISTS = (".csv", ".tsv", ".txt")
"""Files that list image files (see `file_lists`)."""

HIDDEN = (".", "@eaDir", "__MACOSX")
"""How the names of files and folders that are no data start: .git, ._photo.jpg, and thumbnails and
attributes that storage systems and archives add."""

WHOLE_ROOT = "."
SYNONYMS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "testing"),
}
"""Names of each split; the first one found is used."""
_LIKE = {
    split: re.compile(
        rf"(?:^|[\W\d_])(?:{'|'.join(words)})(?:set|data|images?|imgs?|split)?s?(?:$|[\W\d_])",
        re.IGNORECASE,
    )
    for split, words in (("train", SYNONYMS["train"]), ("val", (*SYNONYMS["val"], "dev", "eval")))
}


def data_root(config: DataConfig) -> Path:
    """Return the root of a dataset: a folder, or a list of files; refuse any other."""
    if config.root is None:
        raise UserError(f"data.root is needed for data.name {config.source}")
    is_list = config.source == "folder" and _is_list(config.root)
    if not (config.root.is_dir() or is_list):
        advice = ": unpack it, or give its folder" if config.root.is_file() else ""
        # A run records a relative path as it was given, which may have been elsewhere.
        here = "" if config.root.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"data.root {config.root} is not a folder{here}{advice}")
    return config.root


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in LISTS and path.is_file()


def split_name(config: DataConfig, split: Split) -> str:
    """Return the configured name of a split."""
    return config.train_split if split == "train" else config.val_split


def split_names(config: DataConfig, split: Split) -> tuple[str, ...]:
    """Return the names under which to look for a split: the configured one, then its synonyms.

    A name outside `SYNONYMS` has none: it is taken literally.
    """
    name = split_name(config, split)
    if name.casefold() not in SYNONYMS[split]:
        return (name,)
    taken = split_name(config, "val" if split == "train" else "train").casefold()
    others = [each for each in SYNONYMS[split] if each not in {name, taken}]
    return (name, *others)


def match_split(config: DataConfig, split: Split, present: Collection[str]) -> str | None:
    """Return the first name of a split that is present, or None.

    Case is ignored, except for names that are taken literally (see `split_names`).
    """
    for name in split_names(config, split):
        if name in present:
            return name
        matches = sorted(each for each in present if each.casefold() == name.casefold())
        if matches and len(split_names(config, split)) > 1:
            return matches[0]
    return None


def split_folder(config: DataConfig, split: Split) -> Path | None:
    """Return the folder of a split, or the list of its files; None if the root has no splits.

    `--data.val_split .` makes the root itself the split; `.` for both means no split folders.

    Raises:
        UserError: the root has other split folders but not this one, or folders that look like
            splits with unknown names.
    """
    root, name = data_root(config), split_name(config, split)
    if config.train_split == config.val_split == WHOLE_ROOT:
        return None
    if (root / name).is_dir() or _is_list(root / name):  # the name may be a path
        return root / name
    if root.is_file():
        return None
    folders = subfolders(root)
    found = match_split(config, split, folders)
    if found is not None:
        return root / found
    other = split_name(config, "val" if split == "train" else "train")
    has_other = other != WHOLE_ROOT and (root / other).is_dir()
    if len(split_names(config, split)) == 1 or has_other or looks_split(folders):
        raise UserError(
            f"data.root {root} has no {split} split: there is no folder {name} in it; name the "
            f"splits with --data.train_split and --data.val_split, folders found: "
            f"{listed(folders, 8) or 'none'}{_hold_out(root, folders)}"
        )
    return None


def check_outside(config: DataConfig, folder: Path) -> None:
    """Refuse an output folder in a split: images that are written there would become data."""
    root = config.root
    if config.source != "folder" or root is None or not root.is_dir():
        return
    for split in get_args(Split):
        top: Path | None = None
        with contextlib.suppress(UserError):  # a split that the command may not need
            top = split_folder(config, split) or root
        if top is not None and folder.resolve().is_relative_to(top.resolve()):
            raise UserError(f"output.dir {folder} lies in {top}: its images would become data")


def _hold_out(root: Path, folders: Sequence[str]) -> str:
    """Advise how to hold out part of the only split; empty if there are others."""
    if len(folders) != 1 or not subfolders(root / folders[0]):
        return ""
    return f"; or hold out a fifth of it, with --data.root {root / folders[0]}"


def image_folders_beside(config: DataConfig, extensions: tuple[str, ...]) -> list[str]:
    """Return the folders with images beside the split folders.

    There are some if a class happens to be called train. Only files directly in a folder count.
    """
    root = data_root(config)
    named = {config.train_split.casefold(), config.val_split.casefold()}.union(*SYNONYMS.values())
    return [
        name
        for name in subfolders(root)
        if name.casefold() not in named and _holds_file(root / name, extensions)
    ]


def _holds_file(folder: Path, extensions: tuple[str, ...]) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(extensions) for entry in entries)
    except OSError:  # not readable
        return False


def subfolders(root: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, except hidden ones."""
    try:
        with os.scandir(root) as entries:
            folders = [entry.name for entry in entries if is_folder(entry)]
    except OSError as error:
        raise UserError(f"cannot list the folder {root}: {error.strerror}") from None
    return sorted(name for name in folders if not name.startswith(HIDDEN))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def looks_split(folders: Collection[str]) -> bool:
    """Return whether folders look like splits, not classes: `Test`, or `train2017` and `val2017`.

    Names that are merely similar count only if both splits occur, or no other folders: a class may
    be called "train station".
    """
    if any(each.casefold() in names for each in folders for names in SYNONYMS.values()):
        return True
    train, val = ({each for each in folders if like.search(each)} for like in _LIKE.values())
    return bool(folders) and (bool(train and val - train) or (train | val) == set(folders))


def nested_splits(files: Collection[str]) -> list[str]:
    """Return two split folders below the top-level folders of some files, or none.

    For `set/train/a/1.jpg` and `set/test/a/2.jpg`, `["set/train", "set/test"]`: read as classes,
    both splits would be mixed.
    """
    parents = {tuple(file.split("/")[:-1]) for file in files}
    below = {parts[:depth] for parts in parents for depth in range(2, len(parts) + 1)}
    of = {
        split: sorted("/".join(parts) for parts in below if parts[-1].casefold() in names)
        for split, names in SYNONYMS.items()
    }
    return [of["train"][0], of["val"][0]] if of["train"] and of["val"] else []
