"""Commands that write the features of a checkpoint's encoder: to a file, as an image."""

import finetune
from mae_et.cli.arguments import Arguments, config_over_data_of
from mae_et.cli.output import print_results, split_json_flag
from mae_et.cli.scores import read_data


def embed(arguments: Arguments) -> None:
    """Write the features of images to a file: .npy, .parquet or .safetensors."""
    arguments, as_json = split_json_flag(arguments)
    config = config_over_data_of("embed", read_data, arguments)
    print_results(finetune.embed(config), as_json)
