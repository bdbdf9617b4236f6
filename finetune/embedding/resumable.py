"""Run images through a frozen network into the rows of a file, which the same command resumes."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.embedding.images import FeatureImages, Part, error_of, name_of
from finetune.embedding.output import description_of, partial_folder
from finetune.embedding.rows import FeatureRows
from finetune.probing.features import encode_images
from finetune.probing.frozen_encoder import FrozenEncoder
from finetune.provenance import origin_of
from finetune.scoring_config import FrozenNetworkConfig
from mae_et.config.data import DataConfig
from mae_et.data.bad_images import refuse_excess
from mae_et.errors import listed
from mae_et.io.atomic import remove_leftovers, write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.io.plain_files import keep_settings
from mae_et.monitoring.progress import Progress
from mae_et.runtime.console import say
from mae_et.runtime.distributed import choose_device

SECONDS_BETWEEN_SAVES = 10.0


@dataclass(frozen=True)
class RowsTask:
    """The images to encode, the rows to compute of each, and the file to write."""

    name: str
    """The command's, for its progress."""
    config: FrozenNetworkConfig
    output: Path
    settings: dict[str, Any]
    """All that determines the output."""
    network: FrozenEncoder
    data: DataConfig
    parts: Sequence[Part]
    row_of: Callable[[Tensor], Tensor]
    """From what the network returns, [L B ...], to rows [B ...]."""
    finish: Callable[[Path, FeatureRows], Path]
    """Writes the finished files to a folder, and returns that which becomes the output."""
    unreadable: str
    """What the rows of unreadable images are."""
    file_type: str = ".npy"
    dtype: str = "float32"
    layers: Sequence[int] = ()


def write_rows(task: RowsTask) -> None:
    """Compute the missing rows, and move the finished files into place."""
    folder = partial_folder(task.output)
    count = sum(len(part.source) for part in task.parts)
    with sole_writer(folder, "output"), _cleared_unless_begun(folder):
        keep_settings(folder / "settings.json", task.settings, f"{folder} has other contents")
        remove_leftovers(folder)
        with contextlib.closing(FeatureRows(folder, task.file_type, count, task.dtype)) as rows:
            _compute_missing(task, rows)
            rows.finish()
        if rows.unreadable:
            named = listed([name_of(task.parts, row) for row in rows.unreadable], 3)
            say(
                f"{len(rows.unreadable)} of {rows.count} images cannot be read: their rows are "
                f"{task.unreadable} ({named}); {error_of(task.parts, rows.unreadable[0])}"
            )
        finished = task.finish(folder, rows)
        about = origin_of(task.config.checkpoint) | task.settings
        about |= {"shape": [rows.count, *rows.shape], "unreadable": rows.unreadable}
        write_text_atomically(description_of(task.output), json.dumps(about, indent=1))
        finished.replace(task.output)
        (folder / "progress.json").unlink()


@contextlib.contextmanager
def _cleared_unless_begun(folder: Path) -> Iterator[None]:
    """Delete a partial output without saved rows, before and after the block."""
    begun = (folder / "progress.json").exists
    if not begun():
        (folder / "settings.json").unlink(missing_ok=True)
    try:
        yield
    finally:
        if not begun():
            shutil.rmtree(folder, ignore_errors=True)


def _compute_missing(task: RowsTask, rows: FeatureRows) -> None:
    """Append the missing rows; save at most every `SECONDS_BETWEEN_SAVES`."""
    if rows.done:
        say(f"resuming at image {rows.done} of {rows.count}")
    if rows.done == rows.count:
        return
    network, data = task.network, task.data
    images = FeatureImages(task.parts, data, network.image_size, network.channels, rows.done)
    device = choose_device(task.config.device)
    saved = time.monotonic()
    with (
        encode_images(network, images, data, task.config, device, task.layers) as batches,
        Progress(task.name, rows.count, rows.done) as progress,
    ):
        for outputs, (labels, readable) in batches:
            rows.append(task.row_of(outputs), labels, readable)
            if not readable.all():
                _refuse_excess(task, rows)
            progress.advance(len(labels))
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                rows.save()
                saved = time.monotonic()


def _refuse_excess(task: RowsTask, rows: FeatureRows) -> None:
    """Refuse too many unreadable images so far, and name up to five."""
    bad = rows.unreadable
    named = listed([name_of(task.parts, row) for row in bad[:6]], 5)
    which = f": {named}; {error_of(task.parts, bad[0])}"
    refuse_excess(len(bad), rows.count, task.data.max_bad_fraction, which=which)
