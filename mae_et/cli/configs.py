"""`mae-et configs`: list the shipped configs."""

import re
import sys
from itertools import takewhile
from pathlib import Path

from mae_et.cli.arguments import Arguments
from mae_et.cli.help import help_requested
from mae_et.cli.output import print_json
from mae_et.config.shipped import shipped_configs
from mae_et.errors import UserError

USAGE = """usage: mae-et configs [WORD ...] [--json]

List the names that --config (and submit's --cluster) take: those of configs with every
WORD in their name or description."""


def configs(arguments: Arguments) -> None:
    """List the shipped configs, which --config takes by name."""
    if help_requested(arguments):
        print(USAGE)
        sys.exit(0)
    words = [word for word in arguments if word != "--json"]
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(f"there is no flag {flags[0]}; mae-et configs takes words and --json")
    folder = shipped_configs()
    about = {
        path.relative_to(folder).with_suffix("").as_posix(): _description(path)
        for path in sorted(folder.rglob("*.yaml"))
    }
    found = {
        name: text
        for name, text in about.items()
        if all(word.lower() in f"{name} {text}".lower() for word in words)
    }
    if not found:
        raise UserError(f"no shipped config has {' '.join(words)}; mae-et configs lists all")
    if "--json" in arguments:
        print_json(found)
        return
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {text}" for name, text in found.items()), flush=True)


def _description(path: Path) -> str:
    """Return the first sentence of a config's header."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = takewhile(lambda line: line.startswith("# "), lines)  # to an empty line
    text = " ".join(line.removeprefix("#").strip() for line in header)
    return re.split(r"\.(?: |$)", text)[0]
