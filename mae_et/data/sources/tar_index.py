"""Index WebDataset shards: the positions and labels of their images."""

import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_et.data.images.decoding import UNLABELLED
from mae_et.errors import UserError

MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 256
MAX_JSON_BYTES = 2**20
JSON_KEYS = ("label", "cls", "class", "class_id", "class_index", "class_name", "target")


class ShardIndex(NamedTuple):
    """The images of one shard."""

    places: np.ndarray
    """Offset and size of each image, int64 [N 2]."""
    labels: list[int | str | None]
    skipped: Counter[str]
    """Number of other files by extension."""
    folders: set[str]
    """Folders of the images, as paths within the archive."""


def index_shard(path: Path, extensions: tuple[str, ...]) -> ShardIndex:
    """Index a shard's images, which have one of the extensions (such as `.jpg`)."""
    try:
        return _index_shard(path, extensions)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a readable WebDataset shard: {error}") from None


def _index_shard(path: Path, extensions: tuple[str, ...]) -> ShardIndex:
    files: list[tuple[str, int, int]] = []
    labels: dict[str, int | str | None] = {}
    unread: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            if entry.isdir():
                continue
            extension = _extension(entry.name)
            if _is_hidden(entry.name):  # such as ._photo.jpg, added by macOS
                skipped["hidden"] += 1
            elif not entry.isreg():
                skipped[f"{extension} (links)"] += 1
            elif extension in {".cls", ".json"}:
                key = entry.name[: -len(extension)]
                content = archive.extractfile(entry)
                label = _read_label(content.read(MAX_JSON_BYTES) if content else b"", extension)
                if label is None:
                    unread.append((key, extension))
                elif extension == ".cls" or key not in labels:
                    labels[key] = label
            else:
                files.append((entry.name, entry.offset_data, entry.size))
        _check_end(path, archive.offset)
    skipped.update(f"{ext} (no label in it)" for key, ext in unread if key not in labels)
    images, others = _images_of_keys(files, labels, extensions)
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    folders = {key.rpartition("/")[0] for key in images}
    return ShardIndex(places, [labels.get(key) for key in images], skipped + others, folders)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  # pathlib takes ten times as long


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in name.split("/"))


def _images_of_keys(
    files: Sequence[tuple[str, int, int]],
    labels: dict[str, int | str | None],
    extensions: tuple[str, ...],
) -> tuple[dict[str, tuple[int, int]], Counter[str]]:
    """Return the position of each key's image, in archive order, and the skipped files."""
    owned = set(labels)
    split = (_split_at_first_dot(name) for name, *_ in files)
    owned.update(key for key, rest in split if rest in extensions)
    images: dict[str, tuple[int, int]] = {}
    extension_of: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for name, *place in files:
        key, rest = _split_at_first_dot(name)
        suffix = _extension(name)
        if rest != suffix and suffix in extensions and key not in owned:
            key, rest = name[: -len(suffix)], suffix  # the dots are part of the key
        if rest not in extensions:
            skipped[rest] += 1
            continue
        if key in images:  # a second image of the sample: the last one is used
            skipped[extension_of[key]] += 1
        images[key], extension_of[key] = (place[0], place[1]), rest
    return images, skipped


def _split_at_first_dot(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return folder + slash + stem, (dot + rest).lower()


def _read_label(content: bytes, extension: str) -> int | str | None:
    """Return the number or name of a class; None if there is none."""
    if extension == ".json":
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if isinstance(found, dict):
            found = next((found[key] for key in JSON_KEYS if found.get(key) is not None), None)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
    else:
        found = content.decode("utf-8-sig", "replace").strip()
    if isinstance(found, bool) or not isinstance(found, (int, str)):
        return None
    text = str(found) if isinstance(found, int) else found.strip()
    if not text or len(text) > MAX_LABEL_BYTES:
        return None
    if not re.fullmatch(r"[+-]?\d+", text):
        return text
    number = int(text)
    if not UNLABELLED <= number < MAX_CLASSES:
        raise ValueError(f"the label {number} is not a class (0 to {MAX_CLASSES - 1})")
    return None if number == UNLABELLED else number


def _check_end(path: Path, end: int) -> None:
    """Refuse an archive that tarfile read only in part; warn if the end marker is missing."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        rest = iter(lambda: file.read(2**20), b"")
        followed = not any(block) and any(part.strip(b"\0") for part in rest)
    if any(block):
        raise tarfile.ReadError(f"it is damaged at byte {end}")
    if followed:
        raise tarfile.ReadError("another archive follows its end marker: join them with tar -A")
    if not block:
        warnings.warn(
            f"{path} has no end marker: it may have been cut, and samples may be missing",
            stacklevel=2,
        )
