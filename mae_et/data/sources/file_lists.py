"""Read lists of image files: CSV, TSV or text with paths and optional labels."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mae_et.data.layout import EXTENSIONS, LISTS
from mae_et.errors import UserError, listed
from mae_et.io.plain_files import read_bytes
from mae_et.runtime.watchdog import heartbeat

PATHS = frozenset({"path", "filepath", "file_path", "file", "filename", "file_name", "image",
                   "image_path", "img"})  # fmt: skip
LABELS = frozenset({"label", "class", "class_name", "category", "target"})
"""Names of the columns, in any case."""
_MAX_BYTES = 2**31
_GLANCE_BYTES = 2**16


class FileList(NamedTuple):
    """The rows of a list of files, each file once."""

    names: list[str]
    """Paths, relative to the list's folder or absolute."""
    labels: list[str]
    """Names of the classes; empty for no label."""
    facts: list[str]
    """What may surprise."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted: by number if all are numbers."""
        names = sorted({label for label in self.labels if label})
        return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def read_file_list(path: Path) -> FileList:
    """Read a list of image files: columns path and label, with or without a header."""
    rows = _rows(read_list_text(path), path.suffix.lower())
    if not rows:
        raise UserError(f"{path} is empty: it must name image files")
    names, facts = [""] * len(rows[0]), []
    if not any(map(_is_image, rows[0])):
        names, rows = [name.casefold() for name in rows[0]], rows[1:]
    width = len(rows[0]) if rows else 0
    column = next((i for i, name in enumerate(names) if name in PATHS), None)
    if column is None and rows:
        column = next((i for i, cell in enumerate(rows[0]) if _is_image(cell)), None)
    if column is None or not rows:
        raise UserError(
            f"{path} names no image in its first rows: give a column `path` of files such as "
            "images/a.jpg, relative to the folder of the list"
        )
    of_label = next((i for i, name in enumerate(names) if name in LABELS), None)
    if of_label is None and width == 2:
        of_label = 1 - column
    if unread := [name or str(i) for i, name in enumerate(names) if i not in {column, of_label}]:
        facts.append(f"columns not read: {listed(unread)}")
    labels: dict[str, str] = {}
    repeated = 0
    for row in rows:
        if len(row) != width or not row[column]:
            raise UserError(f"{path}: the row {','.join(row)!r} does not have {width} columns")
        name, label = os.path.normpath(row[column]), "" if of_label is None else row[of_label]
        if labels.setdefault(name, label) != label:
            raise UserError(f"{path} has two labels for {name}: {labels[name]!r} and {label!r}")
        repeated += 1
    if repeated := repeated - len(labels):
        facts.append(f"rows that repeat a file: {repeated}")
    if other := [name for name in labels if not _is_image(name)]:
        raise UserError(
            f"{len(other)} of {len(labels)} files in {path} are no images by their extension "
            f"({listed(other, 3)})"
        )
    return FileList(list(labels), list(labels.values()), facts)


def image_lists(folder: Path) -> list[str]:
    """Return the names of the lists of image files in a folder."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in LISTS)
    return [path.name for path in found if path.is_file() and _lists_images(path)]


def _lists_images(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            text = file.read(_GLANCE_BYTES).decode("utf-8-sig", errors="replace")
        return any(map(_is_image, [cell for row in _rows(text, path.suffix)[:2] for cell in row]))
    except (OSError, csv.Error):
        return False


def read_list_text(path: Path) -> str:
    """Return the text of a list, without a byte order mark."""
    try:
        return read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the list {path}: {error}") from None


def _rows(text: str, suffix: str) -> list[list[str]]:
    """Split a list into cells: at tabs, commas or semicolons; else, in .txt, at the last space."""
    lines = [line for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    delimiter = next((each for each in "\t,;" if each in first), None)
    if suffix == ".txt" and all(map(_is_image, lines)):
        rows: Iterable[Sequence[str]] = ([line] for line in lines)
    elif delimiter is None and suffix == ".txt":
        rows = (re.split(r"\s+(?=\S+$)", line.strip()) for line in lines)
    else:
        rows = csv.reader(lines, delimiter=delimiter or ",", skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in rows]


def _is_image(cell: str) -> bool:
    return cell.strip().lower().endswith(EXTENSIONS)


def check_files(path: Path, names: Sequence[str]) -> None:
    """Refuse a list of files that are not there, with their number; lists each folder once."""
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, file = str(path.parent / name).rpartition("/")
        if folder not in present:
            heartbeat()
            here = Path(folder)
            present[folder] = {each.name for each in here.iterdir()} if here.is_dir() else set()
        if file not in present[folder]:
            missing.append(name)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} files in {path} are not there ({listed(missing, 3)}): "
            f"paths are relative to {path.parent}, or absolute"
        )
