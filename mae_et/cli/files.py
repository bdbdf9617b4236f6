"""Commands that draw or write files: previews, reports, features, weights, datasets."""

import shutil
import sys
from pathlib import Path
from typing import Any

import finetune
from finetune.feature_config import EmbedConfig, FeatureMapConfig
from finetune.run_folder import read_classifier_config
from mae_et.cli.arguments import Arguments, config_of, config_over_data_of
from mae_et.cli.output import prints_results
from mae_et.config.commands import (
    ExportConfig,
    PrepareConfig,
    PreviewConfig,
    ReconstructConfig,
    ReportConfig,
)
from mae_et.config.words import expand_path
from mae_et.errors import UserError


def _preview_config(name: str, arguments: Arguments) -> PreviewConfig | FeatureMapConfig:
    """Parse `preview RUN`, or `preview --features CHECKPOINT`."""
    first, equals, checkpoint = (arguments or [""])[0].partition("=")
    if first == "--features":
        words = [checkpoint, *arguments[1:]] if equals else arguments[1:]
        return config_over_data_of("preview --features", words)
    if first and not first.startswith("-"):  # the folder of a run
        recorded = expand_path(Path(arguments[0]), "run") / "config.yaml"
        if not recorded.is_file():
            raise UserError(f"{recorded.parent} is not a run folder")
        arguments = [f"--config={recorded}", *arguments[1:]]
    return config_of(name, arguments)


@prints_results("preview", _preview_config)
def preview(config: PreviewConfig | FeatureMapConfig) -> dict[str, Any]:
    """Draw images as each stage shows them, or features, as a PNG."""
    if isinstance(config, FeatureMapConfig):
        from finetune.embedding.maps import draw_feature_maps

        return {"image": str(draw_feature_maps(config))}
    from mae_et.training.preview import preview

    return {"image": str(preview(config, config.save))}


@prints_results("reconstruct")
def reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Draw images masked, reconstructed and pasted, as a PNG."""
    from mae_et.reconstruction import reconstruct

    return {"image": str(reconstruct(config))}


@prints_results("embed", config_over_data_of)
def embed(config: EmbedConfig) -> dict[str, Any]:
    """Write the features of images as .npy, .parquet or .safetensors."""
    return finetune.embed(config)


@prints_results("export")
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


@prints_results("prepare")
def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write a dataset as shards at several sizes (--data.name shards)."""
    from mae_et.data.prepare import prepare

    return prepare(config)


def compare(arguments: Arguments) -> None:
    """Print the results of several runs as one table."""
    config = config_of("compare", arguments)
    from mae_et.monitoring.compare import compare
    from slurm.run_status import unfinished

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(compare(config, width, unfinished(config.runs)), flush=True)


@prints_results("report")
def report(config: ReportConfig) -> dict[str, Any]:
    """Write an HTML page about runs, which opens offline."""
    from mae_et.monitoring.report import report

    return {"report": str(report(config.runs, config.output))}
