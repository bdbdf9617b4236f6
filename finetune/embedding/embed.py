"""Write the features of images to a file: `mae-et embed`.

Images are encoded in the order of their listing, a batch at a time. Memory holds one batch and the
labels. A partial file is kept in OUTPUT.partial, from which the same command resumes.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.embedding.images import FeatureImages, Part, error_of, name_of, open_parts
from finetune.embedding.output import description_of, is_finished, partial_folder, settings_of
from finetune.embedding.projector import show_in_projector
from finetune.embedding.rows import FeatureRows
from finetune.embedding.tables import check_parquet, rows_of, write_csv, write_parquet
from finetune.feature_config import EmbedConfig, FilePool
from finetune.probing.features import encode_images
from finetune.probing.frozen_encoder import FrozenEncoder, open_encoder_and_data
from finetune.probing.intermediate_layers import block_indices
from finetune.provenance import origin_of
from mae_et.config.data import DataConfig, check_statistics
from mae_et.config.typed import typed
from mae_et.data.bad_images import refuse_excess
from mae_et.errors import listed
from mae_et.io.atomic import remove_leftovers, write_text_atomically
from mae_et.io.lock import check_writable, sole_writer
from mae_et.io.plain_files import keep_settings, read_mapping
from mae_et.models.features import pool_tokens
from mae_et.monitoring.progress import Progress
from mae_et.runtime.console import say
from mae_et.runtime.distributed import choose_device

SECONDS_BETWEEN_SAVES = 10.0


@torch.no_grad()
def embed(config: EmbedConfig) -> dict[str, Any]:
    """Write the features of images to `config.output`, resuming a partial file.

    Returns:
        The file, the number of images, and how many of them could not be read.

    Raises:
        UserError: the checkpoint, the data or the output cannot be used, or the output holds
            features of another encoder, other images or other settings.
        RunFailed: too many images cannot be read.
    """
    config = typed(config, EmbedConfig)
    if config.output.suffix == ".parquet":
        check_parquet()
    encoder, data = open_encoder_and_data(config)
    check_statistics(data, encoder.channels)
    block_indices(encoder, config.layers)  # refused before the data are opened
    parts = open_parts(data, config.split, encoder.channels)
    images = sum(len(part.source) for part in parts)
    counted = ", ".join(f"{len(part.source)} {part.split}" for part in parts)
    say(f"images to encode: {counted}")
    settings = settings_of(config, encoder, data, parts)
    if config.projector is not None:
        check_writable(config.projector)
    if not is_finished(config.output, settings):
        _write(config, encoder, data, parts, settings)
    about = read_mapping(description_of(config.output))
    results = {
        "features": str(config.output),
        "images": images,
        "shape": about["shape"],
        "unreadable": len(about["unreadable"]),
    }
    if config.projector is not None:
        results["projector"] = str(config.projector)
        results["points"] = show_in_projector(
            config.projector, config, data, parts, encoder.channels, about["unreadable"]
        )
    return results


def _write(
    config: EmbedConfig,
    encoder: FrozenEncoder,
    data: DataConfig,
    parts: Sequence[Part],
    settings: dict[str, Any],
) -> None:
    """Encode the missing images, and move the finished files into place."""
    folder = partial_folder(config.output)
    count = sum(len(part.source) for part in parts)
    with sole_writer(folder, "output"), _cleared_unless_begun(folder):
        keep_settings(folder / "settings.json", settings, f"{folder} has other features")
        remove_leftovers(folder)
        with contextlib.closing(
            FeatureRows(folder, config.output.suffix, count, config.dtype)
        ) as rows:
            _encode_missing(config, encoder, data, parts, rows)
            features = rows.finish()
        labelled = bool((rows.labels() >= 0).any())
        if rows.unreadable:
            named = listed([name_of(parts, row) for row in rows.unreadable], 3)
            say(
                f"{len(rows.unreadable)} of {rows.count} images cannot be read: their rows are NaN "
                f"({named}); {error_of(parts, rows.unreadable[0])}"
            )
        names = ((name, part.split) for part in parts for name in part.names(data))
        table = rows_of(names, rows.labels(), parts[0].source.classes)
        if config.output.suffix == ".parquet":
            features = folder / "parquet"
            write_parquet(features, table, labelled, rows.features())
        else:
            write_csv(folder / "csv", table, labelled)
            (folder / "csv").replace(config.output.with_suffix(".csv"))
        about = origin_of(config.checkpoint) | settings
        about |= {"shape": [rows.count, *rows.shape], "unreadable": rows.unreadable}
        write_text_atomically(description_of(config.output), json.dumps(about, indent=1))
        features.replace(config.output)
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


def _encode_missing(
    config: EmbedConfig,
    encoder: FrozenEncoder,
    data: DataConfig,
    parts: Sequence[Part],
    rows: FeatureRows,
) -> None:
    """Append the missing rows; save at most every `SECONDS_BETWEEN_SAVES`."""
    if rows.done:
        say(f"resuming at image {rows.done} of {rows.count}")
    if rows.done == rows.count:
        return
    images = FeatureImages(parts, data, encoder.image_size, encoder.channels, rows.done)
    device = choose_device(config.device)
    saved = time.monotonic()
    with (
        encode_images(encoder, images, data, config, device, config.layers) as batches,
        Progress("embed", rows.count, rows.done) as progress,
    ):
        for tokens, (labels, readable) in batches:
            features = [pooled(encoder.network, layer, config.pool) for layer in tokens]
            rows.append(torch.cat(features, dim=-1), labels, readable)
            if not readable.all():
                bad, first = len(rows.unreadable), error_of(parts, rows.unreadable[0])
                refuse_excess(bad, rows.count, data.max_bad_fraction, which=f": {first}")
            progress.advance(len(labels))
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                rows.save()
                saved = time.monotonic()


def pooled(network: Any, tokens: Tensor, pool: FilePool) -> Tensor:
    """[B P+N D] tokens -> [B D], or the patch tokens [B N D] with pool none."""
    if pool == "none":
        return tokens[:, network.num_prefix_tokens :]
    return pool_tokens(network, tokens, pool)
