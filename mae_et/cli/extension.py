"""The command line of an extended run: mae-et pretrain RUN --extend-to EPOCHS."""

import argparse
from pathlib import Path

from mae_et.config.files import config_from_text
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.io.plain_files import read_text

Arguments = list[str]


def flags_of_extension(arguments: Arguments) -> Arguments:
    """Replace `RUN --extend-to EPOCHS` by the config of RUN and the keys that extend it.

    The warm-up lasts as long as in RUN; the new folder is RUN-EPOCHSep. Flags override all of it.

    Raises:
        UserError: RUN is missing or not a run of pre-training, or EPOCHS is not a number.
    """
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--extend-to", "--extend_to", nargs="?", const="")
    given, rest = option.parse_known_args(arguments)
    epochs = given.extend_to
    if epochs is None:
        return arguments
    if not rest or rest[0].startswith("-"):
        raise UserError("--extend-to needs the run to extend: mae-et pretrain RUN --extend-to E")
    run = Path(rest[0])
    written = run / "config.yaml"
    if not written.is_file():
        raise UserError(f"{run} is not a run folder of mae-et pretrain: it has no config.yaml")
    if (run / "classes.json").exists():
        raise UserError(f"{run} is a classifier's run: --extend-to extends runs of pretrain")
    try:
        before = config_from_text(read_text(written), PretrainConfig)
    except UserError as error:
        raise UserError(f"{written}: {error}") from None
    try:
        budget = float(epochs)
    except ValueError:
        raise UserError(f"--extend-to must be a number of epochs, got {epochs!r}") from None
    shorter = before.curriculum.epochs / budget if budget > 0 else 1.0
    return [
        f"--config={written}",
        f"--init.extends={run}",
        f"--curriculum.epochs={budget!r}",
        f"--optim.warmup_fraction={before.optim.warmup_fraction * min(shorter, 1.0)!r}",
        f"--output.dir={run}-{budget:g}ep",
        *rest[1:],
    ]
