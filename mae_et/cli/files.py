"""Commands that write files for others: checkpoints for other libraries, prepared datasets."""

from mae_et.cli.arguments import Arguments, config_of
from mae_et.cli.output import print_json


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
