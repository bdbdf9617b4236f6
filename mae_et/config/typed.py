"""Convert the fields of configs built in Python to their types, or refuse them."""

from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mae_et.errors import UserError, require

Config = TypeVar("Config")
_types = cache(get_type_hints)


def typed(config: Config, kind: type[Config]) -> Config:
    """Return a config whose fields have their declared types, as if read from YAML.

    A dataclass accepts any value: a string for a path, a list for a tuple, or a misspelt choice,
    which an if-else chain would treat as its last case.
    """
    require(
        isinstance(config, kind), f"config must be a {kind.__name__}, got {type(config).__name__}"
    )
    if _fits(config, type(config)):
        return config
    from yaml.representer import RepresenterError  # slow to import, as are the following

    from mae_et.config.files import config_from_text, to_yaml

    known: Any = config
    try:
        text = to_yaml(known)
    except RepresenterError as error:  # a function or an array, for example
        raise UserError(f"config: {error.args[0]}: {error.args[1]!r}") from None
    return config_from_text(text, type(known))


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value has a type, without looking into lists and mappings."""
    if is_dataclass(value) and value.__class__ is hint:
        types = _types(hint)
        return all(_fits(getattr(value, each.name), types[each.name]) for each in fields(value))
    kind = get_origin(hint)
    if kind is Literal:
        return value in get_args(hint)
    if kind in {Union, UnionType}:
        return any(_fits(value, each) for each in get_args(hint))
    return isinstance(value, (float, int) if hint is float else kind or hint)
