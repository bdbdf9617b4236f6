"""Read WebDataset shards with random access, and write them.

timm's reader streams shards, and so cannot resume at a given sample. Here the archives are indexed
once, and each image is then read at its offset.
"""

import io
import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_et.config.schema import DataConfig
from mae_et.data.file_listing import count_by_extension
from mae_et.data.layout import Split, match_split, split_name, split_names, subfolders
from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically

UNLABELLED = -1
MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 256
MAX_JSON_BYTES = 2**20
JSON_KEYS = ("label", "cls", "class", "class_id", "class_index", "class_name", "target")
COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)


# --- shards of a split ----------------------------------------------------------------------------


def find_shards(config: DataConfig, root: Path, split: Split) -> list[Path]:
    """Return a split's shards: `ROOT/NAME/*.tar`, or `ROOT/*.tar` with NAME as a word of the file.

    NAME may be a synonym of the configured one (see `layout.SYNONYMS`). Shards that name no split
    are for training.

    Raises:
        UserError: no shard is found, or all are compressed.
    """
    found = _shards_named(config, root, split)
    if not found and split == "train":
        others = _shards_named(config, root, "val")
        found = [path for path in sorted(root.glob("*.tar")) if path not in others]
    if not found:
        packed = sorted(path.name for path in root.rglob("*") if COMPRESSED.search(path.name))
        if packed:
            raise UserError(
                f"data.root {root} has compressed shards ({packed[0]}), which have no random "
                "access: decompress them to .tar"
            )
        name = split_name(config, split)
        raise UserError(
            f"data.root {root} has no {split} shards ({name}/*.tar or *-{name}-*.tar): name the "
            "splits with --data.train_split and --data.val_split"
        )
    return found


def _shards_named(config: DataConfig, root: Path, split: Split) -> list[Path]:
    folder = match_split(config, split, subfolders(root))
    if folder is not None:
        return sorted((root / folder).glob("*.tar"))
    shards = sorted(root.glob("*.tar"))
    for name in split_names(config, split):
        found = [path for path in shards if name.casefold() in _words(path)]
        if found:
            return found
    return []


def _words(path: Path) -> list[str]:
    return re.split(r"[\W_\d]+", path.stem.casefold())


# --- reading --------------------------------------------------------------------------------------


class TarShards:
    """The images of shards: `shards[i] -> (bytes, label)`.

    The files of a sample share a key: the path up to the first dot of the file's name. The label of
    `a/b.jpg` is in `a/b.cls` (a number or a class name) or in `a/b.json` (see `JSON_KEYS`). A name
    with several dots, `a/b.1.jpg`, belongs to the key `a/b` if there is an image or a label of that
    key; else its key is `a/b.1`.

    Args:
        paths: the archives.
        extensions: of images, in lower case, with the dot.
        classes: names of the classes, where labels are names; None to take those that occur.

    Raises:
        UserError: a shard is damaged, a label is out of range, or a class is not in `classes`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        extensions: tuple[str, ...],
        classes: Sequence[str] | None = None,
    ):
        self.paths = list(paths)
        found = [index_shard(path, extensions) for path in self.paths]
        # Arrays, not lists: see `image_folder.ImageFiles`.
        self.shards = np.repeat(np.arange(len(found)), [len(each.labels) for each in found])
        raw = [label for each in found for label in each.labels]
        self.has_names = any(isinstance(label, str) for label in raw)
        self.classes, labels = _number_classes(raw, classes, self.paths)
        offsets = np.concatenate([each.places for each in found]) if found else _places([])
        self.places = np.column_stack([offsets, labels])
        """Offset, size and label of each image, int64 [N 3]."""
        self.skipped = sum((each.skipped for each in found), Counter())

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 [N]; -1 without a label."""
        return self.places[:, 2]

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        offset, size, label = map(int, self.places[index])
        with self.paths[self.shards[index]].open("rb") as file:
            file.seek(offset)
            return file.read(size), label

    def name(self, index: int) -> str:
        """Return the archive and offset of an image, for error messages."""
        return f"at byte {self.places[index][0]} of {self.paths[self.shards[index]]}"

    def summary(self) -> str:
        """Return what is unusual about the samples, with counts; empty if nothing is."""
        facts = []
        unlabelled = int((self.labels == UNLABELLED).sum())
        if 0 < unlabelled < len(self):
            facts.append(f"{unlabelled} without a label")
        if self.skipped:
            facts.append(count_by_extension(self.skipped.items()))
        return "; ".join(facts)


def _number_classes(
    raw: Sequence[int | str | None], classes: Sequence[str] | None, paths: Sequence[Path]
) -> tuple[list[str], np.ndarray]:
    """Return the classes and the label of each image, int64 [N].

    Labels that are all numbers are classes 0 to their maximum; else all are names, in order.
    """
    if not any(isinstance(label, str) for label in raw):
        numbers = np.array([UNLABELLED if label is None else label for label in raw], np.int64)
        return [str(i) for i in range(1 + max(numbers, default=UNLABELLED))], numbers
    names = [label if label is None else str(label) for label in raw]
    present = sorted({name for name in names if name is not None})
    if len(present) > MAX_CLASSES:
        raise UserError(f"the shards in {paths[0].parent} have {len(present)} classes")
    classes = present if classes is None else list(classes)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise UserError(
            f"the shards in {paths[0].parent} have classes that the training split lacks: "
            f"{', '.join(unknown[:5])}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array(
        [UNLABELLED if name is None else number[name] for name in names], np.int64
    )


# --- indexing -------------------------------------------------------------------------------------


class ShardIndex(NamedTuple):
    """The images of one shard."""

    places: np.ndarray
    """Offset and size of each image, int64 [N 2]."""
    labels: list[int | str | None]
    skipped: Counter[str]
    """Number of other files by extension."""


def index_shard(path: Path, extensions: tuple[str, ...]) -> ShardIndex:
    """Read the headers and labels of a shard, once in a process while the file does not change.

    Raises:
        UserError: it is damaged, or a label is out of range.
    """
    try:
        status = path.stat()
        return _index_shard(path, extensions, status.st_size, status.st_mtime_ns)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a readable WebDataset shard: {error}") from None


@lru_cache(maxsize=4096)
def _index_shard(path: Path, extensions: tuple[str, ...], size: int, changed: int) -> ShardIndex:
    files: list[tuple[str, int, int]] = []
    labels: dict[str, int | str | None] = {}
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            if not entry.isreg():
                continue
            extension = Path(entry.name).suffix.lower()
            if extension in {".cls", ".json"}:
                key = entry.name[: -len(extension)]
                content = archive.extractfile(entry)
                label = _read_label(content.read(MAX_JSON_BYTES) if content else b"", extension)
                if label is not None and (extension == ".cls" or key not in labels):
                    labels[key] = label
            else:
                files.append((entry.name, entry.offset_data, entry.size))
        _check_end(path, archive.offset)
    images, skipped = _images_of_keys(files, labels, extensions)
    return ShardIndex(_places(list(images.values())), [labels.get(k) for k in images], skipped)


def _images_of_keys(
    files: Sequence[tuple[str, int, int]],
    labels: dict[str, int | str | None],
    extensions: tuple[str, ...],
) -> tuple[dict[str, tuple[int, int]], Counter[str]]:
    """Return the place of each key's image, in the order of the archive, and the skipped files."""
    owned = set(labels)
    owned.update(key for key, rest in map(_split_at_first_dot, _names(files)) if rest in extensions)
    images: dict[str, tuple[int, int]] = {}
    skipped: Counter[str] = Counter()
    for name, *place in files:
        key, rest = _split_at_first_dot(name)
        suffix = Path(name).suffix.lower()
        if rest != suffix and suffix in extensions and key not in owned:
            key, rest = name[: -len(suffix)], suffix  # the dots are part of the key
        if rest not in extensions:
            skipped[rest] += 1
            continue
        if key in images:  # a second image of the sample; the last one counts
            skipped[rest] += 1
        images[key] = (place[0], place[1])
    return images, skipped


def _names(files: Sequence[tuple[str, int, int]]) -> list[str]:
    return [name for name, *_ in files]


def _split_at_first_dot(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return folder + slash + stem, (dot + rest).lower()


def _read_label(content: bytes, extension: str) -> int | str | None:
    """Return the number or the name of a class, or None.

    Raises:
        ValueError: a number is out of range (classes are numbered from 0, in a table).
    """
    if extension == ".json":
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if isinstance(found, dict):
            found = next((found[key] for key in JSON_KEYS if key in found), None)
    else:
        found = content.decode("utf-8", "replace").strip()
    if isinstance(found, bool) or not isinstance(found, (int, str)):
        return None
    text = str(found) if isinstance(found, int) else found.strip()
    if not text or len(text) > MAX_LABEL_BYTES:
        return None
    if not re.fullmatch(r"[+-]?\d+", text):
        return text
    number = int(text)
    if not UNLABELLED <= number < MAX_CLASSES:
        raise ValueError(f"the label {number} is no class (0 to {MAX_CLASSES - 1})")
    return None if number == UNLABELLED else number


def _check_end(path: Path, end: int) -> None:
    """Refuse an archive in which tarfile stopped at a damaged header; warn of a missing end."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise tarfile.ReadError(f"it is damaged at byte {end}")
    if not block:
        warnings.warn(
            f"{path} has no end marker: it may have been cut, and samples may be missing",
            stacklevel=2,
        )


def _places(rows: list[tuple[int, int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


# --- writing --------------------------------------------------------------------------------------


class TarWriter:
    """Write a shard, and put it in place when it is complete."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "TarWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        self.tar = tarfile.open(self.temporary, "w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, name: str, content: bytes) -> int:
        """Add a file and return the offset of its content."""
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        self.tar.addfile(entry, io.BytesIO(content))
        return self.tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def __exit__(self, kind: Any, *_: object) -> None:
        self.tar.close()
        if kind is None:
            write_atomically(self.path, self.temporary.replace)
        self.temporary.unlink(missing_ok=True)
