"""Commands that show what an encoder sees and makes of it: previews, features."""

from pathlib import Path

import finetune
from mae_et.cli.arguments import Arguments, config_over_data_of, parse_command, parser_of
from mae_et.cli.output import print_json, print_results, split_json_flag
from mae_et.cli.scores import read_data


def embed(arguments: Arguments) -> None:
    """Write the features of images to a file: .npy, .parquet or .safetensors."""
    arguments, as_json = split_json_flag(arguments)
    config = config_over_data_of("embed", read_data, arguments)
    print_results(finetune.embed(config), as_json)


def preview(arguments: Arguments) -> None:
    """Draw what each stage shows the encoder of your images, as a PNG; --features: its features."""
    parser = parser_of("preview")
    parser.add_argument("--save", type=Path, default=Path("preview.png"), help="PNG to write")
    if arguments and not arguments[0].startswith("-"):  # the folder of a run
        arguments = [f"--config={Path(arguments[0]) / 'config.yaml'}", *arguments[1:]]
    config, options = parse_command("preview", arguments, parser)
    from mae_et.training.preview import preview

    print_json({"image": str(preview(config, options["save"]))})
