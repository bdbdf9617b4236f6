"""Commands that draw or write files: previews, reconstructions, features, weights, datasets."""

from pathlib import Path
from typing import Any

import finetune
from mae_et.cli.arguments import Arguments, config_of, config_over_data_of
from mae_et.cli.output import prints_results


@prints_results
def preview(arguments: Arguments) -> dict[str, Any]:
    """Draw what each stage shows the encoder of your images, as a PNG; --features: its features."""
    if arguments and arguments[0].partition("=")[0] == "--features":
        checkpoint = arguments[0].partition("=")[2]
        return _preview_features([checkpoint, *arguments[1:]] if checkpoint else arguments[1:])
    if arguments and not arguments[0].startswith("-"):  # the folder of a run
        arguments = [f"--config={Path(arguments[0]) / 'config.yaml'}", *arguments[1:]]
    config = config_of("preview", arguments)
    from mae_et.training.preview import preview

    return {"image": str(preview(config, config.save))}


def _preview_features(arguments: Arguments) -> dict[str, Any]:
    """Draw the patch features of an encoder: preview --features CHECKPOINT."""
    config = config_over_data_of("preview --features", arguments)
    from finetune.feature_maps import draw_feature_maps

    return {"image": str(draw_feature_maps(config))}


@prints_results
def reconstruct(arguments: Arguments) -> dict[str, Any]:
    """Write a PNG of images: masked, reconstructed and pasted."""
    config = config_of("reconstruct", arguments)
    from mae_et.reconstruction import reconstruct

    return {"image": str(reconstruct(config))}


@prints_results
def embed(arguments: Arguments) -> dict[str, Any]:
    """Write the features of images to a file: .npy, .parquet or .safetensors."""
    config = config_over_data_of("embed", arguments)
    return finetune.embed(config)


@prints_results
def export(arguments: Arguments) -> dict[str, Any]:
    """Write a checkpoint in the layout of timm, Hugging Face or MAE."""
    config = config_of("export", arguments)
    from mae_et.checkpoints.export import export

    path = export(
        config.checkpoint,
        config.format,
        config.output,
        config.encoder_num_heads,
        config.decoder_num_heads,
        config.checkpoint_key,
    )
    return {"format": config.format, "output": str(path)}


@prints_results
def prepare(arguments: Arguments) -> dict[str, Any]:
    """Write a dataset as shards at several sizes, for --data.name shards."""
    config = config_of("prepare", arguments)
    from mae_et.data.prepare import prepare

    return prepare(config)
