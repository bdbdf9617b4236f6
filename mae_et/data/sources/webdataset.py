"""Read WebDataset shards with random access.

timm's reader streams shards, so it cannot resume at a given sample. Here the archives are indexed
once, and each image is then read at its offset.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mae_et.config.data import DataConfig
from mae_et.data.images.decoding import UNLABELLED, DecodedDataset, extensions_for
from mae_et.data.layout import (
    SYNONYMS,
    Split,
    data_root,
    match_split,
    nested_splits,
    split_name,
    split_names,
    subfolders,
)
from mae_et.data.sources.file_listing import count_by_extension
from mae_et.data.sources.tar_index import MAX_CLASSES, index_shard
from mae_et.errors import UserError, listed, refuse_unknown_classes
from mae_et.runtime.console import notify

COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)


def open_shards(
    config: DataConfig, split: Split, channels: int, own_classes: bool
) -> DecodedDataset:
    """Open a split's shards, and report anything unusual about them."""
    root, extensions = data_root(config), extensions_for(channels)
    shards = _index_split(config, root, split, extensions, own_classes)
    facts = shards.summary()
    if not len(shards):
        raise UserError(
            f"the {split} shards in {root} hold no image of {channels} channels "
            f"({' '.join(extensions)}): {facts or 'they are empty'}"
        )
    if facts:
        count = f"{len(shards)} images in {len(shards.paths)} shards"
        notify(f"{split} split of {root}: {count}; {facts}")
    return DecodedDataset(shards, shards.classes, channels, shards.name, config.max_value)


def _index_split(
    config: DataConfig, root: Path, split: Split, extensions: tuple[str, ...], own_classes: bool
) -> "TarShards":
    """Index a split with classes numbered as in training, whose shards may have more."""
    paths = find_shards(config, root, split)
    shards = TarShards(paths, extensions)
    if split == "train" or own_classes:
        return shards
    try:
        train = find_shards(config, root, "train")
        if train == paths or not (shards.has_names or TarShards(train[:1], extensions).has_names):
            return shards  # numbers have the same meaning in both splits
        classes = TarShards(train, extensions).classes
    except UserError:  # only a validation split
        return shards
    return TarShards(paths, extensions, classes)


def find_shards(config: DataConfig, root: Path, split: Split) -> list[Path]:
    """Return a split's shards: `ROOT/NAME/**/*.tar`, or `ROOT/*.tar` with the word NAME.

    NAME may be a synonym of the configured name (see `layout.SYNONYMS`). Shards without the name of
    a split are for training.
    """
    found = _shards_named(config, root, split)
    if not found and split == "train":
        others = {config.val_split.casefold(), *SYNONYMS["val"]}
        found = [path for path in _archives(root.glob("*")) if not others & set(_words(path))]
    if not found:
        packed = compressed_shards([root, *(root / name for name in subfolders(root))])
        if packed:
            raise UserError(
                f"data.root {root} has compressed shards ({packed[0].name}), which have no random "
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
        return _archives((root / folder).rglob("*"))
    shards = _archives(root.glob("*"))
    for name in split_names(config, split):
        found = [path for path in shards if name.casefold() in _words(path)]
        if found:
            _report_unnamed(config, root, shards)
            return found
    return []


def _archives(paths: Iterable[Path]) -> list[Path]:
    """Return the shards among some paths, sorted, except hidden ones."""
    return sorted(p for p in paths if p.suffix.lower() == ".tar" and not p.name.startswith("."))


def _report_unnamed(config: DataConfig, root: Path, shards: Sequence[Path]) -> None:
    """Report how many shards name no split and are not read."""
    names = {config.train_split.casefold(), config.val_split.casefold()}
    names.update(*SYNONYMS.values())
    others = [path.name for path in shards if not names & set(_words(path))]
    if others:
        notify(
            f"shards in {root} that name no split are not read: {len(others)} ({listed(others, 1)})"
        )


def compressed_shards(folders: Iterable[Path]) -> list[Path]:
    """Return the compressed shards in some folders, sorted."""
    return sorted(
        path for folder in folders for path in folder.iterdir() if COMPRESSED.search(path.name)
    )


def _words(path: Path) -> list[str]:
    return re.split(r"[\W_\d]+", path.stem.casefold())


class TarShards:
    """The images of shards: `shards[i] -> (bytes, label)`.

    The files of a sample share a key: the path up to the first dot of the file's name. The label of
    `a/b.jpg` is in `a/b.cls` (a number or a class name) or in `a/b.json` (`tar_index.JSON_KEYS`).
    An image whose name has several dots, `a/b.1.jpg`, belongs to the key `a/b` if that key has an
    image or a label; otherwise its key is `a/b.1`. Labels that are names index `classes`, by
    default those that occur.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        extensions: tuple[str, ...],
        classes: Sequence[str] | None = None,
    ):
        self.paths = list(paths)
        found = [index_shard(path, extensions) for path in self.paths]
        splits = nested_splits([f"./{name}/*" for each in found for name in each.folders])
        if splits:
            first, second = (Path(split).name for split in splits)
            raise UserError(
                f"{self.paths[0]} has the splits {first} and {second} in it: unpack it, or make "
                "shards of each"
            )
        # Arrays, not lists: see `image_files.ImageFiles`.
        self.shards = np.repeat(np.arange(len(found)), [len(each.labels) for each in found])
        raw = [label for each in found for label in each.labels]
        self.has_names = any(isinstance(label, str) for label in raw)
        self.classes, labels = _number_classes(raw, classes, self.paths)
        offsets = np.concatenate([each.places for each in found])
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

    def identity(self) -> Iterator[bytes]:
        """Yield the names of the archives, and offsets and labels; see `fingerprint`."""
        yield repr([path.name for path in self.paths]).encode()
        yield self.places.tobytes()

    def names_in(self, _: Path | None) -> Iterator[str]:
        """Yield SHARD/FILE of each image; one shard's headers are in memory at a time."""
        for number, path in enumerate(self.paths):
            with tarfile.open(path, "r:") as archive:
                names = {entry.offset_data: entry.name for entry in archive}
            for offset in self.places[self.shards == number, 0].tolist():
                yield f"{path.name}/{names[offset]}"

    def name(self, index: int) -> str:
        """Return the archive and offset of an image, for error messages."""
        return f"at byte {self.places[index][0]} of {self.paths[self.shards[index]]}"

    def summary(self) -> str:
        """Describe anything unusual about the samples, with counts; empty if nothing is."""
        facts = []
        unlabelled = int((self.labels == UNLABELLED).sum())
        if 0 < unlabelled < len(self):
            facts.append(f"{unlabelled} without a label")
        if self.skipped:
            facts.append(count_by_extension(self.skipped))
        packed = compressed_shards({path.parent for path in self.paths})
        if packed:
            facts.append(f"{len(packed)} compressed shards skipped ({packed[0].name}, ...)")
        return "; ".join(facts)


def _number_classes(
    raw: Sequence[int | str | None], classes: Sequence[str] | None, paths: Sequence[Path]
) -> tuple[list[str], np.ndarray]:
    """Return the classes and the label of each image, int64 [N].

    If all labels are numbers, the classes are 0 to their maximum; otherwise all are names, sorted.
    """
    if classes is None and not any(isinstance(label, str) for label in raw):
        numbers = np.array([UNLABELLED if label is None else label for label in raw], np.int64)
        return [str(i) for i in range(1 + max(numbers, default=UNLABELLED))], numbers
    names = [label if label is None else str(label) for label in raw]
    present = sorted({name for name in names if name is not None})
    if len(present) > MAX_CLASSES:
        raise UserError(f"the shards in {paths[0].parent} have {len(present)} classes")
    classes = present if classes is None else list(classes)
    refuse_unknown_classes(present, classes, f"the shards in {paths[0].parent} have")
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array(
        [UNLABELLED if name is None else number[name] for name in names], np.int64
    )
