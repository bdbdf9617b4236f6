"""Open Hugging Face datasets, and choose their image and label columns."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.config.data import DataConfig
from mae_et.config.refusals import one_sentence
from mae_et.data.images.decoding import UNLABELLED, DecodedDataset
from mae_et.data.layout import Split, split_name, split_names
from mae_et.data.sources.tar_index import MAX_CLASSES
from mae_et.errors import UserError, listed, refuse_unknown_classes
from mae_et.runtime.console import notify

NUMBERS = "int", "uint", "bool"
NAMES = "string", "large_string"  # pandas and Polars write the latter


def open_hugging_face(
    config: DataConfig, split: Split, channels: int, _: bool = False
) -> DecodedDataset:
    """Open `hfds/NAME` from the hub, or `hfds/FOLDER`, any folder that `datasets` can read.

    Images are in the column `image`, or else in the only image column (CIFAR-10's is `img`). Labels
    are in the column `label`, or else in the one with the most classes (CIFAR-100's `fine_label`);
    they are class labels, numbers or names. Columns with other names are reported.

    Raises:
        UserError: `datasets` is not installed, or the dataset or a column cannot be used.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"data.name {config.source} needs the extra hf: pip install '.[hf]' (in the clone)"
        )
    try:
        inner = _open_split(config, split)
    except Exception as error:  # unknown datasets, failing downloads and damaged files
        raise UserError(
            f"the {split} split of {config.source} cannot be opened (data.{split}_split "
            f"{split_name(config, split)}): {one_sentence(error)}"
        ) from error
    name = f"{{}} of {config.source}".format
    return DecodedDataset(inner, inner.classes, channels, name, config.max_value)


class HuggingFaceImages:
    """Rows of a dataset as encoded images and labels: `images[i] -> (bytes, label)`.

    `image` and `label` are columns of a `datasets.Dataset`; `numbers` maps label values to classes,
    and is None if they are classes already.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str | None,
        numbers: Mapping[Any, int] | None,
        classes: Sequence[str],
    ):
        from datasets import Image

        self.rows = rows.cast_column(image, Image(decode=False))
        self.image, self.label, self.numbers, self.classes = image, label, numbers, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self.rows[index]
        file = row[self.image]
        if file is None:
            raise ValueError(f"its row has no {self.image}")
        content = file["bytes"] or Path(file["path"]).read_bytes()
        return content, UNLABELLED if self.label is None else self._class_of(row[self.label])

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 [N], -1 for none; reads no image."""
        if self.label is None:
            return np.full(len(self), UNLABELLED)
        found = self.rows[self.label][:]
        return np.fromiter(map(self._class_of, found), np.int64, len(self))

    def _class_of(self, value: Any) -> int:
        if self.numbers is not None and value is not None:
            return self.numbers[value]
        return value if isinstance(value, int) else UNLABELLED


def _open_split(config: DataConfig, split: Split) -> HuggingFaceImages:
    """Open a split with its columns, reporting those not called `image` and `label`."""
    name, rows = _rows_of(config, split)
    image, label = _image_column(rows), _label_column(rows)
    facts = [f"the split is {name}"] if name != split_name(config, split) else []
    facts += [f"images from the column {image}"] if image != "image" else []
    facts += [f"labels from the column {label}"] if label not in {"label", None} else []
    kinds = {key: getattr(kind, "dtype", "list") for key, kind in rows.features.items()}
    others = [f"{key} ({kind})" for key, kind in kinds.items() if key != image]
    facts += [f"no class labels in the columns {listed(others)}"] if others and not label else []
    if facts:
        notify(f"{split} split of {config.source}: {', '.join(facts)}")
    if label is None:
        return HuggingFaceImages(rows, image, None, None, [])
    feature = rows.features[label]
    if hasattr(feature, "names"):
        classes, own = (
            _recorded_names(config, each, label) or feature.names for each in ("train", split)
        )
        numbers = _numbers_among(classes, own, rows[label])
        return HuggingFaceImages(rows, image, label, numbers, classes)
    if feature.dtype.startswith(NUMBERS):
        return HuggingFaceImages(rows, image, label, None, _numbered(rows[label][:], label))
    train = rows if split == "train" else _rows_of(config, "train")[1]
    names = sorted(set(train[label][:]) - {None})
    refuse_unknown_classes(set(rows[label][:]) - {None}, names, "it has")
    return HuggingFaceImages(rows, image, label, {each: i for i, each in enumerate(names)}, names)


def _rows_of(config: DataConfig, split: Split) -> tuple[str, Any]:
    """Return the configured split, or the first of its synonyms that exists, with its name."""
    from datasets import load_dataset, load_from_disk

    saved = _saved_split(config, split)
    if saved is not None:
        return saved
    root = str(config.root) if config.root else None
    path = config.source.removeprefix("hfds/")
    inside = config.root is not None and config.root.resolve().is_relative_to(Path(path).resolve())
    if inside and Path(path).is_dir():
        raise ValueError("data.root, its cache, lies in it: the cached files would become data")
    if (Path(path) / "state.json").is_file():  # from Dataset.save_to_disk
        only = split_name(config, "train")
        if split_name(config, split) != only:
            raise ValueError("it is one split; save a DatasetDict to have two")
        return only, load_from_disk(path)
    failed: ValueError | None = None
    for name in split_names(config, split):
        try:
            return name, load_dataset(path, split=name, cache_dir=root)
        except ValueError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _saved_split(config: DataConfig, split: Split) -> tuple[str, Any] | None:
    """Return a split saved by `DatasetDict.save_to_disk`, with its name; None if there is none.

    `load_dataset` would give every split the first one's classes, whatever its own numbers mean.
    """
    from datasets import load_from_disk

    for name in split_names(config, split):
        folder = Path(config.source.removeprefix("hfds/")) / name
        if (folder / "state.json").is_file():
            return name, load_from_disk(str(folder))
    return None


def _recorded_names(config: DataConfig, split: Split, label: str) -> list[str] | None:
    """Return the class names that a split of a local folder records itself; None if it has none.

    `load_dataset` would give every Parquet file the first one's names, whatever its numbers mean.
    Those of a dataset card (README.md) are followed, as it does: they replace those of the files.
    """
    from datasets import Features, load_dataset_builder
    from datasets.info import DatasetInfosDict
    from pyarrow.parquet import read_schema

    saved = _saved_split(config, split)
    if saved is not None:
        return list(saved[1].features[label].names)
    path, root = config.source.removeprefix("hfds/"), str(config.root) if config.root else None
    if not Path(path).is_dir() or (Path(path) / "state.json").is_file():
        return None
    builder_config = load_dataset_builder(path, cache_dir=root).config
    card = DatasetInfosDict.from_directory(path).get(builder_config.name)
    if card is not None and card.features is not None:
        return None
    every = builder_config.data_files or {}
    files = next((every[name] for name in split_names(config, split) if name in every), ())
    found: dict[tuple[str, ...], str] = {}
    for file in files:
        if file.endswith(".parquet"):
            names = getattr(Features.from_arrow_schema(read_schema(file)).get(label), "names", ())
            found.setdefault(tuple(names), Path(file).name)
    if len(found) > 1:
        of = [f"{file} has {listed(names, 3) or 'none'}" for names, file in found.items()]
        raise ValueError(f"its files record different classes: {', '.join(of[:2])}")
    return list(next(iter(found), ()))


def _numbers_among(
    classes: Sequence[str], own: Sequence[str], values: Any
) -> dict[int, int] | None:
    """Map a split's own class numbers to those of `classes`; None if they are equal."""
    if list(own) == list(classes):
        return None
    present = {own[value] for value in values[:] if value not in {None, UNLABELLED}}
    refuse_unknown_classes(present, classes, "it has")
    known = {value: classes.index(name) for value, name in enumerate(own) if name in classes}
    return known | {UNLABELLED: UNLABELLED}


def _image_column(rows: Any) -> str:
    from datasets import Image

    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if "image" in rows.features or len(found) == 1:
        return "image" if "image" in rows.features else found[0]
    others = ", ".join(found or rows.column_names)
    cause = (
        "several columns hold images, and none is called image"
        if found
        else "no column holds images"
    )
    raise ValueError(f"{cause}: {others}")


def _label_column(rows: Any) -> str | None:
    """Return the column `label`, or the one with the most classes; None if there are neither."""
    counts = {
        name: len(feature.names)
        for name, feature in rows.features.items()
        if hasattr(feature, "names")
    }
    if getattr(rows.features.get("label"), "dtype", "").startswith((*NUMBERS, *NAMES)):
        return "label"
    return max(counts, key=lambda name: counts[name], default=None)


def _numbered(values: Sequence[int | None], column: str) -> list[str]:
    """Return the classes 0 to n-1 of numeric labels."""
    numbers = [value for value in values if value is not None]
    count = max(numbers, default=UNLABELLED) + 1
    if count > MAX_CLASSES or min(numbers, default=0) < UNLABELLED:
        raise ValueError(f"the column {column} holds no classes: numbers up to {count - 1}")
    return list(map(str, range(count)))
