"""Write the features of images to a file: `mae-et embed`.

Images are encoded in the order of their listing, a batch at a time. Memory holds one batch and the
labels. A partial file is kept in OUTPUT.partial, from which the same command resumes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.embedding.images import Part, names_of, open_parts, report_parts
from finetune.embedding.output import description_of, is_finished, settings_of
from finetune.embedding.projector import show_in_projector
from finetune.embedding.resumable import RowsTask, write_rows
from finetune.embedding.rows import FeatureRows
from finetune.embedding.tables import check_parquet, rows_of, write_csv, write_parquet
from finetune.feature_config import EmbedConfig, FilePool
from finetune.probing.frozen_encoder import FrozenEncoder, open_encoder_and_data
from finetune.probing.intermediate_layers import block_indices
from mae_et.config.data import DataConfig, check_statistics
from mae_et.config.typed import typed
from mae_et.io.lock import check_writable
from mae_et.io.plain_files import read_mapping
from mae_et.models.features import pool_tokens


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
    images = report_parts(parts, "encode")
    settings = settings_of(
        config, config.output, encoder, data, parts,
        pool=config.pool, layers=config.layers, dtype=config.dtype,
    )  # fmt: skip
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
    """Encode the missing images, and write the file with its table."""

    def row_of(tokens: Tensor) -> Tensor:
        features = [pooled(encoder.network, layer, config.pool) for layer in tokens]
        return torch.cat(features, dim=-1)

    def finish(folder: Path, rows: FeatureRows) -> Path:
        labelled = bool((rows.labels() >= 0).any())
        table = rows_of(names_of(parts, data), rows.labels(), parts[0].source.classes)
        if config.output.suffix == ".parquet":
            write_parquet(folder / "parquet", table, labelled, rows.features())
            return folder / "parquet"
        write_csv(folder / "csv", table, labelled)
        (folder / "csv").replace(config.output.with_suffix(".csv"))
        return rows.paths[0]

    write_rows(RowsTask(
        "embed", config, config.output, settings, encoder, data, parts, row_of, finish,
        "NaN", config.output.suffix, config.dtype, config.layers,
    ))  # fmt: skip


def pooled(network: Any, tokens: Tensor, pool: FilePool) -> Tensor:
    """[B P+N D] tokens -> [B D], or the patch tokens [B N D] with pool none."""
    if pool == "none":
        return tokens[:, network.num_prefix_tokens :]
    return pool_tokens(network, tokens, pool)
