"""Write a dataset as prepared shards (see `prepared_shards.py`): `mae-et prepare`.

Archives and indices are written atomically, a shard's index last: shards with an index are
complete, and an interrupted preparation resumes after them.
"""

import json
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mae_et.config.commands import PrepareConfig
from mae_et.data.bad_images import refuse_excess
from mae_et.data.datasets import open_dataset
from mae_et.data.fingerprint import fingerprint
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.sources.prepared_shards import VERSION, PreparedShards, index_path, read_index
from mae_et.data.sources.shard_writer import write_shard
from mae_et.errors import Unreadable, UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.io.plain_files import keep_settings
from mae_et.io.seals import seal


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write or verify prepared shards.

    Returns:
        For each split, the number of images, of unreadable ones, and the bytes of each level.

    Raises:
        UserError: the dataset has no encoded images, or the output was prepared differently.
        RunFailed: an image cannot be read and `data.on_error` is stop, more images are unreadable
            than `data.max_bad_fraction` allows, or a checksum does not match.
    """
    if config.verify:
        return {split: _verify(config.output / split) for split in config.splits}
    with sole_writer(config.output, "output"):
        # Open all splits first: a missing one is reported before hours of work on another.
        datasets = {split: _open_split(config, split) for split in config.splits}
        return {split: _prepare_split(config, split, each) for split, each in datasets.items()}


def _open_split(config: PrepareConfig, split: Literal["train", "val"]) -> DecodedDataset:
    dataset = open_dataset(config.data, split, config.channels)
    if not isinstance(dataset, DecodedDataset) or not has_encoded_images(dataset):
        raise UserError(f"data.name {config.data.source} has no files to prepare: it is in memory")
    _check_recipe(config, config.output / split, dataset)
    return dataset


def has_encoded_images(dataset: DecodedDataset) -> bool:
    """Return whether the first readable image is stored as encoded bytes."""
    for index in range(len(dataset)):
        try:
            with dataset.naming_errors(index):
                return isinstance(dataset.inner[index][0], bytes)
        except Unreadable:
            continue
    return True


def _check_recipe(config: PrepareConfig, folder: Path, dataset: DecodedDataset) -> None:
    """Write the recipe; refuse to resume with another one."""
    recipe = {
        "images": len(dataset),
        "data": fingerprint(dataset),
        "levels": list(config.levels),
        "quality": config.quality,
        "shard_images": config.shard_images,
    }
    refusal = f"{folder} was prepared from other data or with other settings"
    keep_settings(folder / "recipe.json", recipe, refusal)


def _prepare_split(config: PrepareConfig, split: str, dataset: DecodedDataset) -> dict[str, Any]:
    folder = config.output / split
    shards = range(-(-len(dataset) // config.shard_images))
    finished = [shard for shard in shards if index_path(folder, shard).is_file()]
    missing = sorted(set(shards) - set(finished))
    bad = 0
    with (
        tqdm(total=len(missing), desc=f"shards of {split}", disable=None) as bar,
        closing(_write_shards(dataset, config, folder, missing)) as written,
    ):
        for shard in chain(finished, written):
            rows = read_index(folder, shard, len(config.levels))
            if shard not in missing:
                _check_same_image(dataset, shard * config.shard_images, rows, folder)
            bad += len(unreadable_rows(rows))
            refuse_excess(
                bad, len(dataset), config.data.max_bad_fraction, f" of {split}",
                "; they were reported when their shards were written",
            )  # fmt: skip
            bar.update(shard in missing)
    description = {
        "version": VERSION,
        "images": len(dataset),
        "shards": len(shards),
        "levels": list(config.levels),
        "classes": list(dataset.classes),
    }
    write_text_atomically(folder / "split.json", json.dumps(seal(description), indent=1))
    return _summary(PreparedShards(folder))


def _check_same_image(dataset: DecodedDataset, first: int, rows: np.ndarray, folder: Path) -> None:
    """Refuse a finished shard whose first readable image differs from the dataset's.

    `first` is the index of the shard's first image, `rows` the shard's index.
    """
    readable = np.flatnonzero(rows["size"][:, -1])
    if not len(readable):
        return
    row = int(readable[0])
    with dataset.naming_errors(first + row):
        content = dataset.inner[first + row][0]
    if zlib.crc32(content) != rows["crc32"][row, -1]:
        raise UserError(
            f"{folder} was prepared from other images: {dataset.name(first + row)} is not the file "
            "that it holds; give another output"
        )


def _write_shards(
    dataset: DecodedDataset, config: PrepareConfig, folder: Path, shards: Sequence[int]
) -> Generator[int]:
    """Write shards, `num_workers` at a time, and yield each one's number when it is done."""
    if config.num_workers == 1:
        for shard in shards:
            write_shard(dataset, config, folder, shard)
            yield shard
        return
    # Threads suffice: Pillow decodes, resizes and encodes without the GIL.
    pool = ThreadPoolExecutor(config.num_workers)
    try:
        pending = {
            pool.submit(write_shard, dataset, config, folder, shard): shard for shard in shards
        }
        for done in as_completed(pending):
            done.result()
            yield pending[done]
    finally:
        pool.shutdown(cancel_futures=True)


def _verify(folder: Path) -> dict[str, Any]:
    shards = PreparedShards(folder)
    for index in tqdm(range(len(shards)), desc=f"verifying {folder.name}", disable=None):
        for position, size in enumerate(shards.rows["size"][index]):
            if size:
                shards.read(index, position)
    return _summary(shards)


def _summary(shards: PreparedShards) -> dict[str, Any]:
    sizes = shards.rows["size"].sum(0).tolist()
    names = [str(level or "original") for level in shards.levels]
    return {
        "images": len(shards),
        "unreadable": len(unreadable_rows(shards.rows)),
        "bytes": dict(zip(names, sizes, strict=True)),
    }


def unreadable_rows(rows: np.ndarray) -> np.ndarray:
    """Return the positions of unreadable images in an index, int64 [K]."""
    return np.flatnonzero(rows["size"][:, -1] == 0)
