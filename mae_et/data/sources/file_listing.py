"""List the image files of a folder, and cache listings of large ones."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_et.config.data import DataConfig
from mae_et.data.layout import EXTENSIONS, HIDDEN, is_folder
from mae_et.data.sources.array_files import read_array, write_array
from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically
from mae_et.io.lock import check_writable
from mae_et.runtime.console import notify
from mae_et.runtime.watchdog import heartbeat


class Listing(NamedTuple):
    """The image files below a folder."""

    names: list[str]
    """Paths relative to the folder, sorted."""
    skipped: Counter[str]
    """Number of other files by extension; empty for a cached listing."""


def list_folder(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> Listing:
    """List the files with the given extensions below a folder, except hidden ones."""
    skipped: Counter[str] = Counter()
    try:
        names = list(_walk(str(folder), "", (), extensions, skipped))
    except OSError as error:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}") from None
    return Listing(names, skipped)


def _walk(
    folder: str,
    prefix: str,
    ancestors: tuple[str, ...],
    extensions: tuple[str, ...],
    skipped: Counter[str],
) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in ancestors:  # a symbolic link to a parent folder
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    heartbeat()
    for entry in ordered:
        if entry.name.startswith(HIDDEN):
            continue
        if is_folder(entry):
            path = f"{prefix}{entry.name}/"
            yield from _walk(entry.path, path, (*ancestors, here), extensions, skipped)
        elif entry.name.lower().endswith(extensions):
            yield prefix + entry.name
        else:
            skipped[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122


def cached_listing(config: DataConfig, folder: Path, extensions: tuple[str, ...]) -> Listing:
    """List a folder, or read the listing of an earlier run from `data.listing`."""
    if config.listing is None:
        return list_folder(folder, extensions)
    key = hashlib.sha256(f"{folder.resolve()}\0{extensions}".encode()).hexdigest()[:16]
    path = config.listing / f"{key}.npy"
    if path.is_file():
        try:
            names = _check_names(read_array(path))
        except (OSError, ValueError) as error:
            raise UserError(f"the listing {path} is damaged ({error}): delete it") from None
        when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        notify(f"{folder}: {len(names)} files as listed at {when} (delete {path} to list anew)")
        return Listing(names, Counter())
    check_writable(config.listing)  # before hours of listing
    listing = list_folder(folder, extensions)
    array = np.array([os.fsencode(name) for name in listing.names], dtype=np.bytes_)
    write_atomically(path, lambda temporary: write_array(temporary, array))
    return listing


def _check_names(array: np.ndarray) -> list[str]:
    """Decode the names of a listing; refuse names outside its folder."""
    if array.ndim != 1 or (array.dtype.kind != "S" and array.size):
        raise ValueError("it is not a list of names")
    names = [os.fsdecode(name) for name in array.tolist()]
    for name in names:
        # Symbolic links below the folder are followed, as in a walk.
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"{name!r} lies outside of the folder")
    return names


def count_by_extension(skipped: Counter[str]) -> str:
    """Return `9 files skipped (7 .txt, 2 without extension)`, with at most six extensions."""
    ordered = sorted(skipped.items(), key=lambda row: (-row[1], row[0]))
    shown = [f"{count} {extension or 'without extension'}" for extension, count in ordered[:6]]
    total = skipped.total()
    rest = ", ..." if len(ordered) > 6 else ""
    return f"{total} {'file' if total == 1 else 'files'} skipped ({', '.join(shown)}{rest})"
