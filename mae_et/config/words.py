"""Prepare the words of a command line for the parser: spelling, switches, paths."""

import dataclasses
import errno
import glob
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser

from mae_et.config.key_checks import type_of
from mae_et.errors import UserError

IMPOSSIBLE = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM})
"""Errors of a path that is wrong, unlike those of a file that is missing or a disk that fails."""


def prepare_words(words: list[str], parser: ArgumentParser, kind: type[Any]) -> list[str]:
    """Rewrite the words of a command line as the parser expects them.

    Flags may be spelled with dashes or underscores, switches need no value, and flags of several
    paths take several words and patterns: `--images a.jpg photos/*.jpg`.
    """
    options = {option for action in parser._actions for option in action.option_strings}
    spelled = [_with_known_spelling(word, options) for word in words]
    return _with_switches(_with_path_lists(spelled, kind), kind)


def join_config_flags(words: Iterable[str]) -> list[str]:
    """Write each `--config NAME` of a command line as one word, `--config=NAME`."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--config":
            joined[-1] = f"--config={word}"
        else:
            joined.append(word)
    return joined


def replace_config_names(words: Iterable[str], change: Callable[[str], object]) -> list[str]:
    """Replace NAME by `change(NAME)` in each `--config=NAME`."""
    flag = "--config="
    return [
        f"{flag}{change(word.removeprefix(flag))}" if word.startswith(flag) else word
        for word in join_config_flags(words)
    ]


def expand_paths(value: Any, key: str = "") -> Any:
    """Expand `~` and environment variables in every path of a config."""
    if isinstance(value, Path):
        return expand_path(value, key)
    if isinstance(value, (list, tuple)):
        return type(value)(expand_paths(item, key) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {
        name: expanded
        for name, item in found.items()
        if (expanded := expand_paths(item, f"{key}.{name}".lstrip("."))) != item
    }
    return dataclasses.replace(value, **changed) if changed else value


def expand_path(path: Path, key: str) -> Path:
    """Expand `~`, `~user`, `$NAME` and `${NAME}` in a path that can exist.

    One that does not, and begins or ends with white space, is refused too.
    """
    try:
        expanded = os.path.expandvars(path.expanduser())
    except RuntimeError:
        raise UserError(f"{key} {path}: there is no such user") from None
    try:
        os.stat(expanded)  # noqa: PTH116
    except ValueError as error:
        raise UserError(f"{key} {path}: {error}") from None
    except OSError as error:
        if error.errno in IMPOSSIBLE:
            raise UserError(f"{key} {path}: {error.strerror}") from None
    if expanded != expanded.strip() and not os.path.lexists(expanded):
        raise UserError(f"{key} {expanded!r} begins or ends with white space")
    unset = re.search(r"\$(?:\{(\w+)\}|(\w+))", expanded)
    if unset and not path.exists():
        name = unset[1] or unset[2]
        raise UserError(f"{key} {path}: the environment variable {name} is not set")
    return Path(expanded) if expanded != str(path) else path


def _with_known_spelling(word: str, options: set[str]) -> str:
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or flag in options:
        return word
    for spelled in (flag.replace("-", "_"), flag.replace("_", "-")):
        spelled = "--" + spelled[2:]
        if spelled in options:
            return f"{spelled}{equals}{value}"
    return word


def _with_switches(words: list[str], kind: type[Any]) -> list[str]:
    """Give `true` to switches without a value: --untrained, --efficiency.compile."""
    found = list(words)
    for place, word in enumerate(words):
        bare = place + 1 == len(words) or words[place + 1].startswith("--")
        if bare and word.startswith("--") and _is_switch(word.removeprefix("--"), kind):
            found[place] = f"{word}=true"
    return found


def _with_path_lists(words: list[str], kind: type[Any]) -> list[str]:
    """Collect the words after a flag of several paths into one value."""
    found: list[str] = []
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not _takes_paths(flag.removeprefix("--"), kind):
            found.append(f"{flag}{equals}{value}")
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        found += [flag, _path_list(values)] if values else [flag]
    return found


def _path_list(values: list[str]) -> str:
    """Return paths and patterns as one YAML list; a value that is already a list is kept."""
    if len(values) == 1 and re.fullmatch(r"\[.*\]", values[0]) and not Path(values[0]).exists():
        if not Path(values[0][1:-1]).exists():
            return values[0]
        values = [values[0][1:-1]]  # one path, which YAML would split at a comma or a colon
    paths: list[str] = []
    for value in values:
        pattern = str(expand_path(Path(value), "path"))
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207  (of absolute patterns too)
        matching = [] if Path(pattern).exists() else sorted(found)
        paths += matching or [value]
    return json.dumps(paths)


def _is_switch(key: str, kind: Any) -> bool:
    """Return whether a key can be true or false."""
    found = type_of(key, kind)
    return found is bool or bool in get_args(found)


def _takes_paths(key: str, kind: Any) -> bool:
    """Return whether a key is a list of paths."""
    found = type_of(key, kind)
    return get_origin(found) in {list, tuple} and Path in get_args(found)
