"""Commands that draw or write files: previews, reconstructions, features, weights, datasets."""

from pathlib import Path

import finetune
from mae_et.cli.arguments import Arguments, config_of, config_over_data_of
from mae_et.cli.output import print_json, print_results, split_json_flag


def preview(arguments: Arguments) -> None:
    """Draw what each stage shows the encoder of your images, as a PNG; --features: its features."""
    if arguments and arguments[0].partition("=")[0] == "--features":
        checkpoint = arguments[0].partition("=")[2]
        _preview_features([checkpoint, *arguments[1:]] if checkpoint else arguments[1:])
        return
    if arguments and not arguments[0].startswith("-"):  # the folder of a run
        arguments = [f"--config={Path(arguments[0]) / 'config.yaml'}", *arguments[1:]]
    config = config_of("preview", arguments)
    from mae_et.training.preview import preview

    print_json({"image": str(preview(config, config.save))})


def _preview_features(arguments: Arguments) -> None:
    """Draw the patch features of an encoder: preview --features CHECKPOINT."""
    config = config_over_data_of("preview --features", arguments)
    from finetune.feature_maps import draw_feature_maps

    print_json({"image": str(draw_feature_maps(config))})


def reconstruct(arguments: Arguments) -> None:
    """Write a PNG of images: masked, reconstructed and pasted."""
    config = config_of("reconstruct", arguments)
    from mae_et.reconstruction import reconstruct

    print_json({"image": str(reconstruct(config))})


def embed(arguments: Arguments) -> None:
    """Write the features of images to a file: .npy, .parquet or .safetensors."""
    arguments, as_json = split_json_flag(arguments)
    config = config_over_data_of("embed", arguments)
    print_results(finetune.embed(config), as_json)


def export(arguments: Arguments) -> None:
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
    print_json({"format": config.format, "output": str(path)})


def prepare(arguments: Arguments) -> None:
    """Write a dataset as shards at several sizes, for --data.name shards."""
    config = config_of("prepare", arguments)
    from mae_et.data.prepare import prepare

    print_json(prepare(config))
