"""Write a data set as prepared shards (see `prepared.py`): `mae-et prepare`.

A shard's archives are written first and its index last, each whole or not at all; so a shard whose
index is there is done, and a preparation that was interrupted goes on behind it.
"""

import hashlib
import io
import json
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from mae_et.config.commands import PrepareConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.decoding import DecodedDataset, open_image
from mae_et.data.prepared_shards import (
    ORIGINAL,
    VERSION,
    PreparedShards,
    archive_path,
    index_dtype,
    index_path,
    read_index,
)
from mae_et.data.webdataset import UNLABELLED, TarWriter
from mae_et.errors import RunFailed, Unreadable, UserError
from mae_et.io.atomic import write_atomically, write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.io.plain_files import keep_settings

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
           "PPM": "ppm"}  # fmt: skip


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write, or verify, what a config asks for.

    Returns:
        Images, those that cannot be read, and bytes of each level, of each split.

    Raises:
        UserError: the data are no encoded pictures, or the output was prepared otherwise.
        RunFailed: an image cannot be read and `data.on_error` is stop, or more than
            `data.max_bad_fraction` of them cannot, or a checksum does not match.
    """
    if config.verify:
        return {split: _verified(config.output / split) for split in config.splits}
    with sole_writer(config.output):
        # A split that is missing is told now, rather than after hours of work on the one before.
        sources = {split: _open_split(config, split) for split in config.splits}
        return {split: _prepare_split(config, split, each) for split, each in sources.items()}


def _open_split(config: PrepareConfig, split: Literal["train", "val"]) -> DecodedDataset:
    source = open_dataset(config.data, split, config.channels)
    if not isinstance(source, DecodedDataset) or not has_files(source):
        raise UserError(f"data.name {config.data.source} has no files to prepare: it is in memory")
    _check_same(config, config.output / split, source)
    return source


def _prepare_split(config: PrepareConfig, split: str, source: DecodedDataset) -> dict[str, Any]:
    folder = config.output / split
    starts = range(0, len(source), config.shard_images)
    missing = [shard for shard in range(len(starts)) if not index_path(folder, shard).is_file()]
    holes: dict[int, int] = {}

    def check(shard: int) -> None:
        """Stop where too many images of the shards so far could not be read."""
        holes[shard] = len(unreadable_rows(read_index(folder, shard, len(config.levels))))
        count = sum(holes.values())
        if count > config.data.max_bad_fraction * len(source):
            raise RunFailed(
                f"{count} of {len(source)} images of {split} cannot be read, more than "
                f"data.max_bad_fraction {config.data.max_bad_fraction:g}; they were named "
                "when their shards were written"
            )

    for shard in set(range(len(starts))) - set(missing):
        check(shard)
    write = partial(write_shard, source, config, folder)
    bar = tqdm(total=len(missing), desc=f"shards of {split}", disable=None)
    if config.num_workers == 1:
        for shard in missing:
            write(shard)
            check(shard)
            bar.update()
    else:
        # Threads, for Pillow decodes, resizes and encodes outside of Python's lock.
        with ThreadPoolExecutor(config.num_workers) as pool:
            done = {pool.submit(write, shard): shard for shard in missing}
            try:
                for each in as_completed(done):
                    each.result()
                    check(done[each])
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    bar.close()
    about = {
        "version": VERSION,
        "images": len(source),
        "shards": len(starts),
        "levels": list(config.levels),
        "classes": list(source.classes),
    }
    write_text_atomically(folder / "split.json", json.dumps(about, indent=1))
    return _summary(PreparedShards(folder))


def _check_same(config: PrepareConfig, folder: Path, source: DecodedDataset) -> None:
    """Note what is prepared, and refuse to go on with what was prepared otherwise."""
    kept = getattr(source.inner, "names", None)  # of a folder: relative to it
    names = kept.tobytes() if kept is not None else b""
    recipe = {
        "images": len(source),
        "names": hashlib.sha256(names).hexdigest(),
        "levels": list(config.levels),
        "quality": config.quality,
        "shard_images": config.shard_images,
    }
    keep_settings(
        folder / "recipe.json",
        recipe,
        f"{folder} was prepared from other data or otherwise ({{key}} differs); give another "
        "output",
    )


def has_files(source: DecodedDataset) -> bool:
    """Whether a source's images are encoded, by the first that can be read."""
    for index in range(len(source)):
        try:
            with source.naming_errors(index):
                return isinstance(source.inner[index][0], bytes)
        except Unreadable:
            continue
    return True


def unreadable_rows(rows: np.ndarray) -> np.ndarray:
    """Return the places, in an index, of images that could not be read."""
    return np.flatnonzero(rows["size"][:, -1] == 0)


def write_shard(source: DecodedDataset, config: PrepareConfig, folder: Path, shard: int) -> None:
    """Write the archives of a shard, then its index; what cannot be read has a row without bytes.

    Raises:
        Unreadable: an image cannot be read, and `data.on_error` is stop.
    """
    first = shard * config.shard_images
    count = min(config.shard_images, len(source) - first)
    rows = np.zeros(count, index_dtype(len(config.levels)))
    levels = [*config.levels, ORIGINAL]
    with ExitStack() as stack:
        tars = [
            stack.enter_context(TarWriter(archive_path(folder, shard, level))) for level in levels
        ]
        for number in range(count):
            index = first + number
            row = rows[number]
            row["label"] = UNLABELLED
            try:
                with source.naming_errors(index):
                    content, label = source.inner[index]
                    row["label"] = label
                    ending, shape, smaller = encode_levels(content, config)
            except Unreadable as error:
                if config.data.on_error == "stop":
                    raise
                tqdm.write(f"mae-et: {error}; left out", file=sys.stderr)
                continue
            row["height"], row["width"] = shape
            for place, file in enumerate([*smaller, content]):
                if file is None:
                    continue
                name = f"{index:09d}"
                kind = ending if levels[place] == ORIGINAL else "jpg"
                row["offset"][place] = tars[place].add(f"{name}.{kind}", file)
                row["size"][place], row["crc32"][place] = len(file), zlib.crc32(file)
                if label >= 0:
                    tars[place].add(f"{name}.cls", str(int(label)).encode())
    write_atomically(index_path(folder, shard), partial(_save, rows))


def _save(rows: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def encode_levels(
    content: bytes, config: PrepareConfig
) -> tuple[str, tuple[int, int], list[bytes | None]]:
    """Return a file's ending, height and width, and its smaller forms, None where it has none.

    Of what is no picture of 8 bits in grey or colours the size is given as 0: it is read whole.
    """
    none: list[bytes | None] = [None] * len(config.levels)
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        return "npy", (0, 0), none
    with open_image(content) as image:
        ending = ENDINGS.get(image.format or "", "img")
        width, height = image.size
        if image.mode not in {"RGB", "L"} or "transparency" in image.info:
            return ending, (0, 0), none
        image.load()
        smaller = [_smaller(image, level, config.quality) for level in config.levels]
        return ending, (height, width), smaller


def _smaller(image: Image.Image, level: int, quality: int) -> bytes | None:
    shorter = min(image.size)
    if shorter <= level:
        return None
    width, height = (max(1, round(side * level / shorter)) for side in image.size)
    file = io.BytesIO()
    # Subsampled colours would cost 0.2 to 1 dB in crops that are read from the level.
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=quality, subsampling=0
    )
    return file.getvalue()


def _verified(folder: Path) -> dict[str, Any]:
    files = PreparedShards(folder)
    for index in tqdm(range(len(files)), desc=f"verifying {folder.name}", disable=None):
        for place, size in enumerate(files.rows["size"][index]):
            if size:
                files.read(index, place)
    return _summary(files)


def _summary(files: PreparedShards) -> dict[str, Any]:
    sizes = files.rows["size"].sum(0).tolist()
    names = [str(level or "original") for level in files.levels]
    return {
        "images": len(files),
        "unreadable": len(unreadable_rows(files.rows)),
        "bytes": dict(zip(names, sizes, strict=True)),
    }
