"""Prepare commands of mae-et as jobs: parsing, follow-ups, and sweeps over flags."""

import hashlib
import itertools
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mae_et.config.data import SOURCE_KEYS
from mae_et.config.schema import RunConfig
from mae_et.config.shipped import find_config
from mae_et.config.words import replace_config_names
from mae_et.data.datasets import ROOTED
from mae_et.errors import UserError
from mae_et.runtime.console import say

TRAININGS = ("pretrain", "finetune", "supervised")
PROBES = ("knn", "linear-probe")
BENCH = "bench"
KINDS = (*TRAININGS, *PROBES, "evaluate", BENCH)
MOST_RUNS = 1000  # in a sweep: SLURM's default limit on the size of a job array
BETWEEN_VALUES = re.compile(r",(?![^\[{]*[\]}])")  # commas outside lists and mappings
# Fine-tuning recipe for each family of encoders.
RECIPES = {
    "vit_small_patch16": "finetune/vit_s16",
    "vit_base_patch16": "finetune/vit_b16",
    "vit_large_patch16": "finetune/vit_l16",
    "vit_huge_patch14": "finetune/vit_h14",
}


@dataclass(frozen=True)
class CommandLine:
    """Functions of the command line of mae-et, passed to this package by the layer above it.

    Jobs pickle `run` by module and name, so both must be module-level functions.
    """

    parse: Callable[[str, list[str]], Any]
    """Returns the config of a command, from its name and arguments."""
    run: Callable[[list[str]], object]
    """Runs a command, from its name followed by its arguments."""


@dataclass(frozen=True)
class Task:
    """A command of mae-et with its parsed config."""

    command_line: CommandLine
    """Functions that parse and run it."""
    kind: str
    """Name of the command."""
    arguments: list[str]
    """Arguments after the name."""
    folder: Path
    """Output folder."""
    config: Any
    """Config parsed from the arguments."""

    @property
    def is_single(self) -> bool:
        """Whether the command runs on one rank only."""
        return self.kind in (*PROBES, "compare")

    @property
    def start(self) -> Path | None:
        """Checkpoint that the command starts from, if any."""
        if isinstance(self.config, RunConfig) and self.config.continues is not None:
            return self.config.continues
        if self.kind in ("pretrain", BENCH):
            found = self.config.init.weights
        else:
            found = (self.config.model if self.kind in TRAININGS else self.config).checkpoint
        return cast("Path | None", found)

    @property
    def words(self) -> list[str]:
        """The command line, without `mae-et`."""
        return [self.kind, *self.arguments]


def parse_task(command_line: CommandLine, kind: str, arguments: Sequence[str]) -> Task:
    """Parse a command line into a task."""
    if kind not in KINDS:
        raise UserError(f"{kind!r} cannot be submitted; choose from {', '.join(KINDS)}")
    given = list(arguments)
    config = command_line.parse(kind, given)
    if kind in TRAININGS:
        # The default may depend on the checkpoint, which may not exist before the job starts.
        if not any(re.match(r"--output\.dir(=|$)", word) for word in given):
            given.append(f"--output.dir={config.output.dir}")
        return Task(command_line, kind, given, config.output.dir, config)
    if kind == BENCH:
        folder = config.output.dir
        if not any(word.partition("=")[0] == "--save" for word in given):
            given.append(f"--save={folder / 'node.json'}")
        return Task(command_line, kind, given, folder, config)
    if config.output is None:
        start = config.checkpoint
        folder = start / kind if start.is_dir() else Path("runs") / f"{kind}-{start.stem}"
        return parse_task(command_line, kind, [*given, f"--output={folder}"])
    return Task(command_line, kind, given, config.output, config)


def follow_up(first: Task, words: str) -> Task:
    """Return a task that starts from the checkpoint of another one, which trains.

    `words` are KIND, or KIND=RECIPE with the name or path of a config.
    """
    kind, _, recipe = words.partition("=")
    after_training = (*PROBES, "finetune", *(() if first.kind == "pretrain" else ("evaluate",)))
    if first.kind not in TRAININGS or kind not in after_training:
        refused = f"--then: {kind!r} cannot follow {first.kind}"
        choices = f"; choose from {', '.join(after_training)}"
        raise UserError(refused + (choices if first.kind in TRAININGS else ""))
    folder = first.folder / kind
    start = [f"--checkpoint={first.folder}"]
    if kind != "finetune":
        given = [f"--config={recipe}"] if recipe else []
        return parse_task(first.command_line, kind, [*given, *start, f"--output={folder}"])
    recipe = recipe or _recipe_of(first)
    given = [*([f"--config={recipe}"] if recipe else []), *start, f"--output.dir={folder}"]
    found = parse_task(first.command_line, kind, given)
    if found.config.model.probe != "none":
        given[-1] += f"-{found.config.model.probe}"  # as without submit
        found = parse_task(first.command_line, kind, given)
    own = found.config.data
    if own.root is None and own.name in {None, *ROOTED}:  # the recipe does not name images
        data = first.config.data
        values = {key: getattr(data, key) for key in SOURCE_KEYS} | {"name": data.source}
        flags = [f"--data.{key}={_written(v)}" for key, v in values.items() if v is not None]
        return parse_task(first.command_line, kind, [*given, *flags])
    return found


def _written(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _recipe_of(first: Task) -> str:
    """Return the recipe for an encoder; empty for the defaults of fine-tuning, with a line."""
    encoder = getattr(first.config.model, "encoder", "")
    for start, recipe in RECIPES.items():
        if encoder.startswith(start):
            return recipe
    say(
        f"--then finetune: no recipe for {encoder!r}, so its defaults, without augmentation; pass "
        "another, as in finetune=finetune/small"
    )
    return ""


def sweep_tasks(first: Task, sweep: Sequence[str]) -> list[Task]:
    """Return a task for each combination of a sweep's `key=value,value`, each with its own folder.

    A value may be a list (`[0.2,1],[0.3,1]`).
    """
    axes = []
    for words in sweep:
        key, equals, values = words.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep must read like optim.base_lr=1e-4,3e-4, got {words!r}")
        key = key.removeprefix("--")
        axes.append([(key, value.strip()) for value in BETWEEN_VALUES.split(values)])
    count = math.prod(map(len, axes))
    if count > MOST_RUNS:
        raise UserError(f"--sweep makes {count} runs; at most {MOST_RUNS} are submitted")
    found: dict[str, Task] = {}
    for combination in itertools.product(*axes):
        name = ",".join(f"{key.split('.')[-1]}={value}" for key, value in combination)
        folder = first.folder / name.replace("/", "_")
        flags = [f"--{key}={value}" for key, value in combination]
        output = "--output.dir" if first.kind in TRAININGS else "--output"
        arguments = [*first.arguments, *flags, f"{output}={folder}"]
        run = parse_task(first.command_line, first.kind, arguments)
        same = found.setdefault(repr(run.config).replace(str(folder), ""), run)
        if same is not run:
            raise UserError(f"--sweep: {same.folder.name} and {folder.name} are the same run")
    return list(found.values())


def freeze_configs(given: Task, folder: Path) -> Task:
    """Copy a task's config files to a folder, so that later edits do not change a pending job."""
    arguments = replace_config_names(given.arguments, lambda name: _copied(name, folder))
    return replace(given, arguments=arguments)


def _copied(name: str, folder: Path) -> Path:
    source = find_config(name)
    digest = hashlib.blake2b(source.read_bytes(), digest_size=6).hexdigest()
    target = folder.absolute() / f"{source.stem}-{digest}.yaml"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
