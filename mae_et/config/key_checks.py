"""Check untrusted configs: they may hold plain values only, and name no class or file to load.

jsonargparse imports the class that a `class_path` names (and for a key of type Any, calls it), and
reads a file if a section is given as text. A config may come from a stranger's checkpoint, so both
are refused here, before jsonargparse parses it.
"""

import dataclasses
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from mae_et.config.plain_yaml import MisreadError, parse_yaml
from mae_et.errors import UserError, listed, one_line

# Keys that make a mapping a class for jsonargparse, and its record of a section's file.
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs", "__path__")


def check_text(text: str, kind: type[Any]) -> None:
    """Refuse a text that is not a plain config of a kind; values are checked by the parser."""
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"Problems parsing config: {one_line(error)}") from None
    if value is None:
        raise UserError("the config has no keys: it is empty, or all of its lines are comments")
    if not isinstance(value, dict):
        raise UserError(f"a config is a mapping of keys, not {_shown(value)}")
    if "config" in value:
        raise UserError("a config cannot name another one (key config); give --config twice")
    _check(value, kind, "")


def check_flags(arguments: Iterable[str], kind: type[Any]) -> None:
    """Refuse flags that name a class, give text for a section, or values that YAML misreads."""
    words = list(arguments)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--config":
            continue
        parent = name.removeprefix("--").rpartition(".")[0]
        kinds = {of := type_of(parent, kind) if parent else None, *get_args(of)}
        mapped = any(get_origin(each) is dict for each in kinds)
        if kinds & {Path, str, int, float, bool} and not mapped:  # a value, no section
            raise UserError(f"there is no flag {name}; did you mean --{parent}?")
        if not equals:
            value = words[place + 1] if place + 1 < len(words) else ""
        try:
            given = parse_yaml(value) if value else value
        except MisreadError as error:
            key = name.removeprefix("--")
            found = type_of(key, kind)
            time = ":" in value and {int, float} & {found, *get_args(found)}
            if time or value.lstrip()[:1] in {"[", "{"}:
                raise UserError(f"{key}: {error}") from None
            given = value  # the parser reads a lone 010 as 10, and text as it is
        except (yaml.YAMLError, ValueError, RecursionError):
            given = value  # text; the parser judges it
        if given is None and value.lower() != "null":  # ~, #2, &a: perhaps the name of a folder
            key = name.removeprefix("--")
            raise UserError(f"{key}: YAML reads {value!r} as null: write null, or ./{value}")
        for part in reversed(name.removeprefix("--").split(".")):
            given = {part: given}
        _check(given, kind, "")


def unknown_keys(text: str, kind: type[Any]) -> list[str]:
    """Return the keys of a config's text that a kind of config does not have."""
    return list(_unknown(parse_yaml(text), kind, ""))


def _unknown(value: Any, kind: Any, prefix: str) -> Iterator[str]:
    section = next(sections_of(kind), None)
    if section is None or not isinstance(value, dict):
        return
    hints = get_type_hints(section)
    for name, item in value.items():
        if name in hints:
            yield from _unknown(item, hints[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def type_of(key: str, kind: Any) -> Any:
    """Return the type of a key (`efficiency.compile`); None if there is no such key."""
    for part in key.split("."):
        section = next(sections_of(kind), None)
        kind = get_type_hints(section).get(part) if section is not None else None
    return kind


def _check(value: Any, kind: Any, key: str) -> None:
    kinds = {kind, *get_args(kind)}
    if value is None and kind is not Any and type(None) not in kinds:
        raise UserError(f"{key} is null or empty: give it a value, or remove the key")
    if value == "" and (kinds & {Path, type(None)} or not kinds & {str, Any}):
        raise UserError(f"{key} is empty: give it a value (is a variable of the shell not set?)")
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, (str, int)):
                raise UserError(f"{key or 'a config'}: {name!r} is not a key")
            if name in CLASS_KEYS:
                raise UserError(f"{key or 'a config'}: {name} is refused: a config names no class")
    section = next(sections_of(kind), None)
    if section is not None and not isinstance(value, (dict, list)) and value is not None:
        keys = listed([f"{key}.{field.name}" for field in dataclasses.fields(section)], 3)
        raise UserError(f"{key}: a section is a mapping of keys ({keys}), not {_shown(value)}")
    hints = get_type_hints(section) if section is not None else {}
    items = value.items() if isinstance(value, dict) else ()
    for name, item in items:
        _check(item, hints.get(name, Any), f"{key}.{name}" if key else str(name))
    for item in value if isinstance(value, list) else ():
        _check(item, kind, key)


def sections_of(kind: Any) -> Iterator[type[Any]]:
    """Yield the dataclasses in a type: the type itself, its items' types, and its alternatives."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
    elif get_origin(kind) in {Union, types.UnionType, tuple, list}:
        for part in get_args(kind):
            yield from sections_of(part)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
