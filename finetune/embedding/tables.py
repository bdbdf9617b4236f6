"""Write names, splits and labels of a feature file: a CSV beside it, or Parquet columns."""

import csv
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange

from mae_et.errors import UserError
from mae_et.io.plain_files import no_follow
from mae_et.monitoring.tables import csv_cell

GROUP_BYTES = 2**26
"""Bytes of features per Parquet row group, and in memory at a time."""


class Image(NamedTuple):
    """A row of a table."""

    name: str
    split: str
    label: int
    """-1 without a label."""
    class_name: str
    """Empty without a label, or if classes have no names."""


def rows_of(
    names: Iterable[tuple[str, str]], labels: np.ndarray, classes: Sequence[str]
) -> Iterator[Image]:
    """Yield the rows of a table, given the (name, split) of each image."""
    for (name, split), label in zip(names, labels.tolist(), strict=True):
        named = classes[label] if 0 <= label < len(classes) else ""
        yield Image(csv_cell(name), split, label, csv_cell(named))


def write_csv(path: Path, rows: Iterable[Image], labelled: bool) -> None:
    """Write columns name and split, and with labels also label and class."""
    columns = slice(4 if labelled else 2)
    with open(path, "w", encoding="utf-8", newline="", opener=no_follow) as file:
        writer = csv.writer(file)
        writer.writerow(["name", "split", "label", "class"][columns])
        writer.writerows(list(row)[columns] for row in rows)


def check_parquet() -> None:
    """Refuse to write Parquet without pyarrow."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "output .parquet needs the extra parquet: pip install '.[parquet]' (in the clone)"
        )


def write_parquet(path: Path, rows: Iterator[Image], labelled: bool, features: np.ndarray) -> None:
    """Write the columns of `write_csv`, and features [N D] or [N P D] (flattened to P * D)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = features if features.ndim == 2 else rearrange(features, "n p d -> n (p d)")
    number = pa.float32() if flat.dtype == np.float32 else pa.float16()
    kinds = {"name": pa.string(), "split": pa.string(), "label": pa.int64(), "class": pa.string()}
    fields = [pa.field(name, kind) for name, kind in kinds.items()][: 4 if labelled else 2]
    schema = pa.schema([*fields, pa.field("features", pa.list_(number, flat.shape[1]))])
    group = max(1, GROUP_BYTES // (flat.shape[1] * flat.itemsize))
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(flat), group):
            part = list(islice(rows, group))
            columns = [pa.array(column) for column in zip(*part, strict=True)][: len(fields)]
            numbers = pa.array(np.ravel(flat[start : start + group]))
            columns.append(pa.FixedSizeListArray.from_arrays(numbers, flat.shape[1]))
            writer.write_table(pa.table(columns, schema=schema))
