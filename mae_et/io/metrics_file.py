"""Records of a run as JSON Lines: metrics, scores, unreadable images, dynamics."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_et.errors import listed
from mae_et.io.plain_files import read_bytes
from mae_et.io.seals import seal, unseal

METRICS = "metrics.jsonl"
SCORES = "scores.jsonl"
DYNAMICS = "dynamics.jsonl"
SEALED = frozenset({SCORES, DYNAMICS})
"""Records with a checksum in each row: they decide the best weights or are not measured again."""
Row = dict[str, Any]
MAX_NUMBER = 1e30  # larger values in a row are damage


_EARLIER_NAMES = {"loss": "val_loss", "raw_loss": "raw_val_loss", "images": "val_images",
                  "train_images": "images"}  # fmt: skip


def with_current_names(entries: Row) -> Row:
    """Rename the scores or results of a classifier whose names earlier versions gave otherwise.

    Their `loss` and `images` were of the validation split, not of training as in other rows.
    """
    if "top1" not in entries or "val_images" in entries:
        return entries
    return {_EARLIER_NAMES.get(key, key): value for key, value in entries.items()}


def is_plausible(value: object) -> bool:
    """Return whether a value is a number of ordinary size; a flipped bit can make any."""
    return isinstance(value, (int, float)) and abs(value) < MAX_NUMBER


def row_line(row: Row, name: str) -> str:
    """Return a row as a line of a record, with a checksum if the record has them."""
    return json.dumps(seal(row) if name in SEALED else row) + "\n"


def read_metrics(
    folder: Path,
    name: str = METRICS,
    is_whole: Callable[[Row], bool] = lambda _: True,
) -> list[Row]:
    """Return the rows of a record in a run folder; an empty list if the file does not exist.

    A half-written last line is skipped silently; damaged lines before it, also those without the
    entries that the caller needs (`is_whole`), are skipped with a warning that lists their numbers.
    """
    path = folder / name
    if not path.is_file():
        return []
    rows, damaged = [], []
    lines = read_bytes(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if name in SEALED:
                row = with_current_names(unseal(row))
        except (ValueError, RecursionError, TypeError, AttributeError):  # not JSON, or not UTF-8
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int) and is_whole(row):
            rows.append(row)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        warnings.warn(f"{path} is damaged: skipped line {listed(damaged)}", stacklevel=2)
    return rows
