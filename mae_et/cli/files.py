"""Commands that draw or write files: previews, reports, features, weights, datasets."""

import shutil
import sys
from pathlib import Path
from typing import Any

import finetune
from finetune.feature_config import EmbedConfig, FeatureMapConfig, PredictConfig
from finetune.run_folder import read_classifier_config
from mae_et.cli.arguments import Arguments, parse
from mae_et.cli.command import Command
from mae_et.config.commands import (
    CompareConfig,
    ExportConfig,
    PrepareConfig,
    PreviewConfig,
    ReconstructConfig,
    ReportConfig,
)
from mae_et.config.words import expand_path
from mae_et.errors import UserError


def preview_config(command: Command, arguments: Arguments) -> PreviewConfig:
    """Parse `preview RUN`, of the run in a folder."""
    if arguments and not arguments[0].startswith("-"):
        recorded = expand_path(Path(arguments[0]), "run") / "config.yaml"
        if not recorded.is_file():
            raise UserError(f"{recorded.parent} is not a run folder")
        arguments = [f"--config={recorded}", *arguments[1:]]
    config: PreviewConfig = parse(command, arguments)
    return config


def preview(config: PreviewConfig) -> dict[str, Any]:
    """Draw images as each stage shows them, or features, as a PNG."""
    from mae_et.training.preview import preview

    return {"image": str(preview(config, config.save))}


def preview_features(config: FeatureMapConfig) -> dict[str, Any]:
    """Draw the features of an encoder as a PNG."""
    from finetune.embedding.maps import draw_feature_maps

    return {"image": str(draw_feature_maps(config))}


def reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Draw images masked, reconstructed and pasted, as a PNG."""
    from mae_et.reconstruction import reconstruct

    return {"image": str(reconstruct(config))}


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Write the features of images as .npy, .parquet or .safetensors."""
    return finetune.embed(config)


def predict(config: PredictConfig) -> dict[str, Any]:
    """Write the classes that a classifier predicts for images, as CSV."""
    return finetune.predict(config)


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a checkpoint in the layout of timm, Hugging Face or MAE."""
    from finetune.training.backbone_export import export_backbone
    from mae_et.checkpoints.writers.export import export

    run = read_classifier_config(config.checkpoint)
    is_folder = config.format == "timm" and config.output.suffix != ".safetensors"
    if run is not None and run.model.backbone is not None and is_folder:
        folder = export_backbone(config.checkpoint, run, config.output)
        return {"format": config.format, "output": str(folder)}
    heads = config.encoder_num_heads, config.decoder_num_heads
    path = export(config.checkpoint, config.format, config.output, *heads, config.checkpoint_key)
    return {"format": config.format, "output": str(path)}


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write a dataset as shards at several sizes (--data.name shards)."""
    from mae_et.data.prepare import prepare

    return prepare(config)


def compare(config: CompareConfig) -> None:
    """Print the results of several runs as one table."""
    from mae_et.monitoring.compare import compare
    from slurm.run_status import unfinished

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(compare(config, width, unfinished(config.runs)), flush=True)


def report(config: ReportConfig) -> dict[str, Any]:
    """Write an HTML page about runs, which opens offline."""
    from mae_et.monitoring.report import report

    return {"report": str(report(config.runs, config.output))}
