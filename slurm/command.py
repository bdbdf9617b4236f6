"""A command of mae-et that is to run as a job, and what follows from one."""

import hashlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mae_et.config.files import find_config
from mae_et.config.schema import SOURCE_KEYS
from mae_et.errors import UserError

TRAININGS = ("pretrain", "finetune", "supervised")
PROBES = ("knn", "linear-probe")
KINDS = (*TRAININGS, *PROBES, "evaluate", "compare")
# Recipes of fine-tuning, by the encoder's width in words.
RECIPES = {
    "vit_small_patch16": "finetune/vit_s16",
    "vit_base_patch16": "finetune/vit_b16",
    "vit_large_patch16": "finetune/vit_l16",
    "vit_huge_patch14": "finetune/vit_h14",
}


@dataclass(frozen=True)
class CommandLine:
    """The command line of mae-et, which is above this package and hands itself down.

    A job pickles `run` by its module and name, so both are plain functions of a module.
    """

    parse: Callable[[str, list[str]], Any]
    """Returns the config of a command, from its name and arguments."""
    run: Callable[[list[str]], object]
    """Runs a command, from its name followed by its arguments."""


@dataclass(frozen=True)
class Task:
    """A command of mae-et."""

    command_line: CommandLine
    """What parses and runs it."""
    kind: str
    """Its name."""
    arguments: list[str]
    """What follows the name on the command line."""
    folder: Path
    """Where it leaves what it finds."""
    config: Any
    """What the arguments mean."""

    @property
    def is_single(self) -> bool:
        """Whether it runs in one process, whatever the cluster has."""
        return self.kind in (*PROBES, "compare")

    @property
    def words(self) -> list[str]:
        """The command line, without `mae-et`."""
        return [self.kind, *self.arguments]


def task(command_line: CommandLine, kind: str, arguments: Sequence[str]) -> Task:
    """Parse a command into a task.

    Raises:
        UserError: there is no such command to submit, or its arguments are wrong.
    """
    if kind not in KINDS:
        raise UserError(f"{kind!r} cannot be submitted; what can: {', '.join(KINDS)}")
    given = list(arguments)
    config = command_line.parse(kind, given)
    if kind in TRAININGS:
        return Task(command_line, kind, given, config.output.dir, config)
    if kind == "compare":
        return Task(command_line, kind, given, config.output.parent, config)
    if config.output is None:
        start = config.checkpoint
        folder = start / kind if start.is_dir() else Path("runs") / f"{kind}-{start.stem}"
        return task(command_line, kind, [*given, f"--output={folder}"])
    return Task(command_line, kind, given, config.output, config)


def following(first: Task, words: str) -> Task:
    """Return a task that starts from the checkpoint of another.

    Args:
        first: the task before.
        words: a kind, or kind=RECIPE with a config.

    Raises:
        UserError: no such kind, or none that can follow; a recipe is needed.
    """
    kind, _, recipe = words.partition("=")
    if first.kind not in TRAININGS or kind not in (*PROBES, "evaluate", "finetune"):
        raise UserError(f"--then: {kind!r} cannot follow {first.kind}")
    if (kind == "evaluate") == (first.kind == "pretrain"):
        raise UserError(f"--then: {kind!r} cannot follow {first.kind}")
    folder = first.folder / kind
    start = [f"--checkpoint={first.folder}"]
    if kind != "finetune":
        given = [f"--config={recipe}"] if recipe else []
        return task(first.command_line, kind, [*given, *start, f"--output={folder}"])
    recipe = recipe or _recipe_of(first)
    given = [f"--config={recipe}", *start, f"--output.dir={folder}"]
    found = task(first.command_line, kind, given)
    if found.config.data.root is None:
        data = first.config.data
        values = {key: getattr(data, key) for key in SOURCE_KEYS} | {"name": data.source}
        flags = [f"--data.{key}={_written(v)}" for key, v in values.items() if v is not None]
        return task(first.command_line, kind, [*given, *flags])
    return found


def _written(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _recipe_of(first: Task) -> str:
    encoder = getattr(first.config.model, "encoder", "")
    for start, recipe in RECIPES.items():
        if encoder.startswith(start):
            return recipe
    raise UserError(
        f"--then finetune: there is no recipe for {encoder!r}; give one, as finetune=my_recipe.yaml"
    )


def arms(first: Task, sweep: Sequence[str]) -> list[Task]:
    """Return a task for each combination of a sweep's values, in folders of their own.

    Args:
        first: what they share.
        sweep: `key=value,value,...` for each key.

    Raises:
        UserError: a word is no sweep, or a value is wrong.
    """
    axes = []
    for words in sweep:
        key, equals, values = words.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep must read like optim.base_lr=1e-4,3e-4, got {words!r}")
        axes.append([(key.removeprefix("--"), value) for value in values.split(",")])
    found = []
    for combination in itertools.product(*axes):
        name = ",".join(f"{key.split('.')[-1]}={value}" for key, value in combination)
        folder = first.folder / name.replace("/", "_")
        flags = [f"--{key}={value}" for key, value in combination]
        output = "--output.dir" if first.kind in TRAININGS else "--output"
        arguments = [*first.arguments, *flags, f"{output}={folder}"]
        found.append(task(first.command_line, first.kind, arguments))
    return found


def frozen(given: Task, folder: Path) -> Task:
    """Return a task whose config files are copies, so that edits do not change a job that waits.

    Args:
        given: the task.
        folder: where copies are kept, named after what they hold.
    """
    arguments = list(given.arguments)
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[place] = f"--config={_copied(argument.partition('=')[2], folder)}"
        elif argument == "--config" and place + 1 < len(arguments):
            arguments[place + 1] = str(_copied(arguments[place + 1], folder))
    return replace(given, arguments=arguments)


def _copied(name: str, folder: Path) -> Path:
    source = find_config(name)
    digest = hashlib.blake2b(source.read_bytes(), digest_size=6).hexdigest()
    target = folder.absolute() / f"{source.stem}-{digest}.yaml"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
