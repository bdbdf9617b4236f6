"""Write a prepared shard: its archives, with smaller copies of its images, and its index."""

import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.config.commands import PrepareConfig
from mae_et.data.images.channels import has_deep_colours, to_channels
from mae_et.data.images.decoding import UNLABELLED, DecodedDataset, open_image
from mae_et.data.sources.array_files import write_array
from mae_et.data.sources.prepared_shards import ORIGINAL, archive_path, index_dtype, index_path
from mae_et.errors import Unreadable
from mae_et.io.atomic import write_atomically
from mae_et.runtime.console import say

EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp",
                "TIFF": "tif", "PPM": "ppm"}  # fmt: skip


def write_shard(dataset: DecodedDataset, config: PrepareConfig, folder: Path, shard: int) -> None:
    """Write the archives of a shard, then its index.

    An unreadable image raises or, with `data.on_error` skip, gets a row without bytes.
    """
    first = shard * config.shard_images
    count = min(config.shard_images, len(dataset) - first)
    rows = np.zeros(count, index_dtype(len(config.levels)))
    rows["label"] = UNLABELLED
    with ExitStack() as stack:
        tars = [
            stack.enter_context(new_archive(archive_path(folder, shard, level)))
            for level in (*config.levels, ORIGINAL)
        ]
        for row, index in zip(rows, range(first, first + count), strict=True):
            try:
                _add_image(dataset, index, config, tars, row)
            except Unreadable as error:
                if config.data.on_error == "stop":
                    raise
                say(f"{error}; skipped")
    write_atomically(index_path(folder, shard), lambda temporary: write_array(temporary, rows))


def _add_image(
    dataset: DecodedDataset,
    index: int,
    config: PrepareConfig,
    tars: Sequence[tarfile.TarFile],
    row: np.void,
) -> None:
    """Add an image to the archives of its levels, and fill in its row of the index."""
    with dataset.naming_errors(index):
        content, label = dataset.inner[index]
        row["label"] = label
        extension, shape, smaller = encode_levels(content, config)
    row["height"], row["width"] = shape
    name = f"{index:09d}"
    for position, (tar, file) in enumerate(zip(tars, [*smaller, content], strict=True)):
        if file is None:
            continue
        is_original = position == len(smaller)
        stored_as = f"{name}.{extension if is_original else 'jpg'}"
        row["offset"][position] = add_file(tar, stored_as, file)
        row["size"][position], row["crc32"][position] = len(file), zlib.crc32(file)
        if label >= 0:
            add_file(tar, f"{name}.cls", str(int(label)).encode())


def encode_levels(
    content: bytes, config: PrepareConfig
) -> tuple[str, tuple[int, int], list[bytes | None]]:
    """Encode the smaller copies of an image file.

    Returns:
        The original's extension, its height and width, and its copy at each level, None if it is
        not larger than the level. Arrays, transparent images and any that are not 8-bit grey or RGB
        have no copies, and size (0, 0): they are read whole.
    """
    none: list[bytes | None] = [None] * len(config.levels)
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        return "npy", (0, 0), none
    with open_image(content) as image:
        extension = EXTENSION_OF.get(image.format or "", "img")
        width, height = image.size
        simple = image.mode in {"RGB", "L"} and "transparency" not in image.info
        if not simple or has_deep_colours(image):
            return extension, (0, 0), none
        image = to_channels(image, len(image.getbands()))  # refuses what Pillow misreads
        smaller = [_encode_level(image, level, config.quality) for level in config.levels]
        return extension, (height, width), smaller


def _encode_level(image: Image.Image, level: int, quality: int) -> bytes | None:
    shorter = min(image.size)
    if shorter <= level:
        return None
    width, height = (max(1, round(side * level / shorter)) for side in image.size)
    file = io.BytesIO()
    # Chroma subsampling would cost crops from the level 0.2 to 1 dB.
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=quality, subsampling=0
    )
    return file.getvalue()


@contextmanager
def new_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Write an archive, and move it into place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)  # from a killed process, or a link to any file
    try:
        with tarfile.open(temporary, "x", format=tarfile.USTAR_FORMAT) as archive:
            yield archive
        write_atomically(path, temporary.replace)
    finally:
        temporary.unlink(missing_ok=True)


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file and return the offset of its content."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
    return archive.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
