"""The command line of a run to resume, extend, branch from or stop early.

mae-et pretrain RUN [--extend-to EPOCHS] [--stop-after-step N]
mae-et pretrain --branch-from RUN --output.dir NEW --optim.base_lr 1e-4
"""

import argparse
import re
from pathlib import Path

from mae_et.checkpoints.listing import run_of
from mae_et.checkpoints.run_config import config_of_run
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.config.words import expand_path
from mae_et.errors import UserError
from mae_et.training.resume.extendable import check_extendable


def split_stop(arguments: list[str]) -> tuple[list[str], int | None]:
    """Remove `--stop-after-step N` from the arguments of a training; return N too.

    It is no key of the config: the schedules are those of the whole run, which resumes without it.
    """
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--stop-after-step", "--stop_after_step", nargs="?", const="")
    given, rest = option.parse_known_args(arguments)
    steps = given.stop_after_step
    if steps is None:
        return rest, None
    if not re.fullmatch("0*[1-9][0-9]*", steps):
        raise UserError(f"--stop-after-step must be a number of steps, got {steps!r}")
    return rest, int(steps)


def flags_of_resumed_run(arguments: list[str]) -> list[str]:
    """Replace a first word `RUN` by the config of RUN, which may have moved since."""
    if not arguments or arguments[0].startswith("-"):
        return arguments
    run = expand_path(Path(arguments[0]), "run")
    if not (run / "config.yaml").is_file():
        return arguments
    return [f"--config={run / 'config.yaml'}", f"--output.dir={run}", *arguments[1:]]


def flags_of_branch(arguments: list[str], kind: type[RunConfig], writes: bool) -> list[str]:
    """Replace `--branch-from RUN` by the config of RUN, which flags and other configs override.

    RUN is a run folder or a checkpoint in one (`step-12000` is short for `step-00012000.pt`). If it
    is gone, the new run's own config serves. `writes`: the command needs a folder for the new run.
    """
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--branch-from", "--branch_from", nargs="?", const="")
    option.add_argument("--output.dir", dest="new")
    given, rest = option.parse_known_args(arguments)
    if given.branch_from is None:
        return arguments
    path = expand_path(Path(given.branch_from), "branch_from")
    if (step := re.fullmatch(r"step-(\d+)(\.pt)?", path.name)) and not path.exists():
        path = path.with_name(f"step-{int(step[1]):08}.pt")
    if given.new is None and writes:
        raise UserError("--branch-from needs the folder of the new run: --output.dir NEW")
    new = run_of(path) if given.new is None else expand_path(Path(given.new), "output.dir")
    found = [folder for folder in (run_of(path), new) if (folder / "config.yaml").is_file()]
    if not found:
        raise UserError(
            "--branch-from needs a run folder, or a checkpoint in one (RUN/checkpoints/step-N.pt), "
            f"which {given.branch_from!r} is not"
        )
    own = [f"--config={found[0] / 'config.yaml'}", f"--branch_from={path}", f"--output.dir={new}"]
    return [*own, *(["--init.extends=null"] if issubclass(kind, PretrainConfig) else []), *rest]


def flags_of_extension(arguments: list[str]) -> list[str]:
    """Replace `RUN --extend-to EPOCHS` by the config of RUN and the keys that extend it.

    The warm-up lasts as long as in RUN; the new folder is RUN-EPOCHSep. Flags override all of it.
    """
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--extend-to", "--extend_to", nargs="?", const="")
    given, rest = option.parse_known_args(arguments)
    epochs = given.extend_to
    if epochs is None:
        return arguments
    if not rest or rest[0].startswith("-"):
        raise UserError("--extend-to needs the run to extend: mae-et pretrain RUN --extend-to E")
    run = expand_path(Path(rest[0]), "run")
    before = config_of_run(run)
    if before is None:
        raise UserError(f"--extend-to extends a run folder of mae-et pretrain, which {run} is not")
    try:
        budget = float(epochs)
    except ValueError:
        raise UserError(f"--extend-to must be a number of epochs, got {epochs!r}") from None
    check_extendable(run, before, budget)
    shorter = before.curriculum.epochs / budget
    return [
        f"--config={run / 'config.yaml'}",
        "--branch_from=null",
        f"--init.extends={run}",
        f"--curriculum.epochs={budget!r}",
        f"--optim.warmup_fraction={before.optim.warmup_fraction * shorter!r}",
        f"--output.dir={run}-{budget:g}ep",
        *rest[1:],
    ]
