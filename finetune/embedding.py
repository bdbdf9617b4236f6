"""Write the features of images to a file: `mae-et embed`.

Images are encoded in the order of their listing, a batch at a time; a batch is in memory, and
nothing else grows with their number but their labels. What is written and not finished is in the
folder OUTPUT.partial, from which the same command resumes.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from finetune.embedding_config import EmbedConfig, FilePool
from finetune.feature_images import FeatureImages, Part, name_of, open_parts
from finetune.feature_rows import FeatureRows
from finetune.feature_tables import check_parquet, rows_of, write_csv, write_parquet
from finetune.features import encode_images
from finetune.frozen_encoder import FrozenEncoder, open_encoder_and_data
from finetune.intermediate_layers import block_indices, encode_layers
from finetune.projector import show_in_projector
from mae_et.config.data import DataConfig, check_statistics
from mae_et.data.bad_images import tolerated_count
from mae_et.errors import RunFailed, UserError
from mae_et.io.atomic import remove_leftovers, write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.io.plain_files import check_settings, keep_settings, read_mapping
from mae_et.models.features import pool_tokens
from mae_et.runtime.console import say
from mae_et.runtime.distributed import choose_device
from mae_et.runtime.precision import autocast_dtype
from mae_et.training.resume import fingerprint

DIFFERENCE = "{key} was {before} and is now {now}; give another output, or delete it"
SECONDS_BETWEEN_SAVES = 10.0


@torch.no_grad()
def embed(config: EmbedConfig) -> dict[str, Any]:
    """Write the features of images to `config.output`, resuming from what is there of it.

    Returns:
        The file, the number of images, and how many of them could not be read.

    Raises:
        UserError: the checkpoint, the data or the output cannot be used, or the output holds
            features of another encoder, other images or other settings.
        RunFailed: too many images cannot be read.
    """
    if config.output.suffix == ".parquet":
        check_parquet()
    encoder, data = open_encoder_and_data(
        config.checkpoint,
        config.data,
        config.encoder_num_heads,
        config.architecture,
        config.checkpoint_key,
    )
    if config.image_size is not None:
        encoder = encoder.at_size(config.image_size)
    check_statistics(data, encoder.channels)
    block_indices(encoder, config.layers)  # refused before the data are opened
    parts = open_parts(data, config.split, encoder.channels)
    images = sum(len(part.source) for part in parts)
    counted = ", ".join(f"{len(part.source)} {part.split}" for part in parts)
    say(f"mae-et: images to encode: {counted}")
    settings = settings_of(config, encoder, data, parts)
    if not _is_finished(config.output, settings):
        _write(config, encoder, data, parts, settings)
    about = read_mapping(_description(config.output))
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


def settings_of(
    config: EmbedConfig, encoder: FrozenEncoder, data: DataConfig, parts: Sequence[Part]
) -> dict[str, Any]:
    """Return everything that the bytes of a file of features depend on."""
    device = choose_device(config.device)
    precision = autocast_dtype(config.precision, device)
    return {
        "file": config.output.name,
        "encoder": weights_hash(encoder.network),
        "images": {part.split: fingerprint(part.source)[:16] for part in parts},
        "mean": data.mean,
        "std": data.std,
        "eval_crop": data.eval_crop,
        "max_value": data.max_value,
        "image_size": encoder.image_size,
        "pool": config.pool,
        "layers": config.layers,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "precision": str(precision or torch.float32).removeprefix("torch."),
        "device": device.type,
    }


def weights_hash(network: torch.nn.Module) -> str:
    """Return a SHA-256 of a network's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _description(output: Path) -> Path:
    return output.with_suffix(".json")


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _is_finished(output: Path, settings: dict[str, Any]) -> bool:
    """Return whether a file has been written with these settings.

    Raises:
        UserError: it has been written with others.
    """
    if not output.exists():
        _check_companions(output)
        return False
    if not _description(output).exists():
        raise UserError(f"output {output} exists, and mae-et embed did not write it")
    before = read_mapping(_description(output))
    check_settings(before, settings, f"{output} has other features: {DIFFERENCE}")
    say(f"mae-et: {output} is complete already")
    shutil.rmtree(_partial(output), ignore_errors=True)  # of a process killed at the very end
    return True


def _check_companions(output: Path) -> None:
    """Refuse to overwrite files of the same name that are another program's, or another output's.

    Raises:
        UserError: there is one.
    """
    about, resumes = _description(output), (_partial(output) / "progress.json").exists()
    mine = about.exists() and read_mapping(about).get("file") == output.name
    for path in (about, output.with_suffix(".csv")):
        if path.exists() and not mine and not resumes:
            raise UserError(f"{path} exists, and would be overwritten: give another output")


def _write(
    config: EmbedConfig,
    encoder: FrozenEncoder,
    data: DataConfig,
    parts: Sequence[Part],
    settings: dict[str, Any],
) -> None:
    """Encode the images that are missing, and put the finished files in their places."""
    folder = _partial(config.output)
    with sole_writer(folder), _cleared_unless_begun(folder):
        keep_settings(
            folder / "settings.json", settings, f"{folder} has other features: {DIFFERENCE}"
        )
        remove_leftovers(folder)
        rows = FeatureRows(
            folder, config.output.suffix, sum(len(part.source) for part in parts), config.dtype
        )
        _encode_missing(config, encoder, data, parts, rows)
        features, labelled = rows.finish(), bool((rows.labels() >= 0).any())
        if rows.unreadable:
            named = ", ".join(str(name_of(parts, row)) for row in rows.unreadable[:3])
            say(
                f"mae-et: {len(rows.unreadable)} of {rows.count} images cannot be read: their rows "
                f"are NaN ({named}{', ...' if len(rows.unreadable) > 3 else ''})"
            )
        names = ((name, part.split) for part in parts for name in part.names(data))
        table = rows_of(names, rows.labels(), parts[0].source.classes)
        if config.output.suffix == ".parquet":
            features = folder / "parquet"
            write_parquet(features, table, labelled, rows.features())
        else:
            write_csv(folder / "csv", table, labelled)
            (folder / "csv").replace(config.output.with_suffix(".csv"))
        about = settings | {"shape": [rows.count, *rows.shape], "unreadable": rows.unreadable}
        write_text_atomically(_description(config.output), json.dumps(about, indent=1))
        features.replace(config.output)
        (folder / "progress.json").unlink()


@contextlib.contextmanager
def _cleared_unless_begun(folder: Path) -> Iterator[None]:
    """Delete a half-written output without a saved row, before and after the block."""
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
    """Append the rows that are missing; save at most every `SECONDS_BETWEEN_SAVES`.

    Raises:
        RunFailed: too many images cannot be read.
    """
    if rows.done:
        say(f"mae-et: resuming at image {rows.done} of {rows.count}")
    if rows.done == rows.count:
        return
    images = FeatureImages(parts, data, encoder.image_size, encoder.channels, rows.done)
    encode = partial(encode_layers, encoder, config.layers)
    batches = encode_images(encoder, images, data, config, choose_device(config.device), encode)
    saved = time.monotonic()
    with tqdm(total=rows.count, initial=rows.done, unit="image", disable=None) as bar:
        for tokens, labels, readable in batches:
            features = [pooled(encoder.network, layer, config.pool) for layer in tokens]
            rows.append(torch.cat(features, dim=-1), labels, readable)
            if len(rows.unreadable) > tolerated_count(data.max_bad_fraction, rows.count):
                raise RunFailed(
                    f"{len(rows.unreadable)} of {rows.count} images cannot be read, more than "
                    f"data.max_bad_fraction {data.max_bad_fraction:g} allows"
                )
            bar.update(len(labels))
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                rows.save()
                saved = time.monotonic()


def pooled(network: Any, tokens: Tensor, pool: FilePool) -> Tensor:
    """[B P+N D] tokens -> [B D], or the patch tokens [B N D] with pool none."""
    if pool == "none":
        return tokens[:, network.num_prefix_tokens :]
    return pool_tokens(network, tokens, pool)
