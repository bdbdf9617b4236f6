"""Read configs from YAML files and flags, layered and strictly checked; write them back."""

import dataclasses
import re
from argparse import Action
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from mae_et.config.key_checks import check_flags, check_text, unknown_keys
from mae_et.config.refusals import REFUSALS, in_flags, one_sentence
from mae_et.config.shipped import find_config
from mae_et.config.suggestions import describe_unknown_key
from mae_et.config.words import expand_paths, prepare_words, replace_config_names
from mae_et.errors import UserError
from mae_et.version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
_WRITTEN_BY = "# mae-et "
OTHER_SECTIONS = ("efficiency", "probe", "output")
"""Sections whose keys do not decide a run's numbers."""

# The docstrings under a config's fields are its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def plain(config: "DataclassInstance") -> dict[str, Any]:
    """Return a config as plain YAML types, in the order of its fields."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        if hasattr(value, "tolist"):  # a number or an array of NumPy
            return value.tolist()
        return str(value) if isinstance(value, Path) else value

    return convert(dataclasses.asdict(config))


def to_yaml(config: "DataclassInstance") -> str:
    """Return a config as YAML that `load_config` reads back to an equal object.

    A comment names the version of mae-et, for the errors of other versions.
    """
    return f"{_WRITTEN_BY}{__version__}\n{yaml.safe_dump(plain(config), sort_keys=False)}"


def to_record(config: "DataclassInstance") -> str:
    """Return a run's config as YAML, with data that can be found from any folder."""
    return to_yaml(with_absolute_roots(config))


def with_absolute_roots(section: Config) -> Config:
    """Make `data.root` and `probe.data.root` absolute."""
    found = {name: getattr(section, name, None) for name in ("data", "probe", "root")}
    return dataclasses.replace(
        section,
        **{
            name: value.absolute() if isinstance(value, Path) else with_absolute_roots(value)
            for name, value in found.items()
            if value is not None
        },
    )


def load_config(
    kind: type[Config],
    files: Sequence[str | Path] | str | Path | None = None,
    flags: Sequence[str] | None = None,
) -> Config:
    """Build a config from YAML files, later over earlier, then flags (`--optim.base_lr 1e-3`).

    Args:
        kind: class of the config, such as `PretrainConfig`.
        files: paths, or names of shipped configs (`pretrain/vit_b16_etpp_400ep`).
        flags: as on the command line.

    Raises:
        UserError: an unknown key, a wrong type or an impossible value, in one sentence.
    """
    names = [files] if isinstance(files, str | Path) else files or []
    arguments = [f"--config={name}" for name in names]
    parser = _parser_of(kind)
    return parse_config(parser, kind, arguments + list(flags or []))


class HelpFormatter(DefaultHelpFormatter):
    """Hide types and null defaults, which the keys' docstrings explain."""

    def _get_type_str(self, action: Action) -> None:
        return None

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        return text if action.default is not None else text.replace(" (default: %(default)s)", "")


def add_config_arguments(
    parser: ArgumentParser, kind: type[Any], paths: str | None = None, skip: Iterable[str] = ()
) -> None:
    """Give a parser `--config`, which may be repeated, and a flag for each field of `kind`.

    `paths` names a field that takes positional arguments, `skip` fields that get no flag.
    """
    parser.formatter_class = HelpFormatter
    parser.allow_abbrev = False  # a prefix of a key is a typo, not an abbreviation
    parser.add_argument(
        "--config", action="config", help="YAML file or shipped name (mae-et configs); repeatable"
    )
    if paths is not None:
        name = paths.removesuffix("s").upper()
        parser.add_argument(paths, metavar=name, nargs="+", type=Path, help="one or more")
    parser.add_class_arguments(kind, fail_untyped=True, skip={*skip, *([paths] if paths else [])})


def parse_config(parser: ArgumentParser, kind: type[Config], arguments: list[str]) -> Config:
    """Parse arguments to an instance of `kind`; flags override files, in any order."""
    return build_config(parser, kind, parse_given(parser, kind, arguments))


def parse_given(parser: ArgumentParser, kind: type[Any], arguments: list[str]) -> Namespace:
    """Parse arguments to the keys that they give, without defaults."""
    for word in arguments:
        if re.search("[\udc80-\udcff]", word):  # Python's stand-ins for bytes that it cannot decode
            raise UserError(
                f"{word!a} is not UTF-8: rename the file, or set LC_ALL=C.UTF-8 if its name is"
            )
    words = prepare_words(arguments, parser, kind)
    words = replace_config_names(words, lambda name: _checked(name, kind))
    words.sort(key=lambda word: not word.startswith("--config="))  # flags override files
    check_flags(words, kind)
    try:
        given: Namespace = parser.parse_args(words, defaults=False)
    except REFUSALS as error:
        raise UserError(in_flags(one_sentence(error, kind), parser, kind, words)) from None
    given.pop("config", None)
    return given


def build_config(
    parser: ArgumentParser, kind: type[Config], given: Namespace, **inherited: Any
) -> Config:
    """Build an instance of `kind` from its defaults, inherited keys over them, and given ones."""
    keys = Namespace()
    for key, value in inherited.items():
        keys[key] = value
    keys.update(given)
    defaults = parser.get_defaults()
    parse = partial(parser.parse_object, keys, defaults=False)
    return expand_paths(_build(parser, kind, lambda: defaults.update(parse())))


def _build(parser: ArgumentParser, kind: type[Config], parse: Callable[[], Namespace]) -> Config:
    names = {f.name for f in dataclasses.fields(kind)}
    try:
        values = dict(parser.instantiate(parse()).items())
        return kind(**{name: value for name, value in values.items() if name in names})
    except REFUSALS as error:
        raise UserError(one_sentence(error, kind)) from None


def _checked(name: str, kind: type[Any]) -> Path:
    """Find a config's file, and check its text before the parser reads it."""
    path = find_config(name)
    try:
        text = path.read_text(encoding="utf-8")
        check_text(text, kind)
        unknown = describe_unknown_key(text, kind)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_sentence(error)}") from None
    if unknown is not None:
        raise UserError(f"{path}, {unknown}{_other_version(text)}")
    return path


def config_from_text(text: str, kind: type[Config]) -> Config:
    """Parse the text that `to_yaml` wrote of a config of a kind."""
    try:
        check_text(text, kind)
        if unknown := unknown_keys(text, kind):
            raise UserError(f"there is no key {unknown[0]}")
        parser = _parser_of(kind)
        return _build(parser, kind, lambda: parser.parse_string(text))
    except UserError as error:
        raise UserError(f"{error}{_other_version(text)}") from None


def _other_version(text: str) -> str:
    """Name the version of mae-et that wrote a config, if it is another one."""
    written = re.search(rf"^{_WRITTEN_BY}([\w.+-]{{1,40}})$", text, re.MULTILINE)
    if written is None or written[1] == __version__:
        return ""
    return f" (mae-et {written[1]} wrote this config; this is {__version__})"


@cache  # building a parser takes longer than using it
def _parser_of(kind: type[Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, kind)
    return parser


def numeric_keys(config: "DataclassInstance") -> dict[str, Any]:
    """Return the keys that decide a run's numbers: all outside `OTHER_SECTIONS`."""
    others = tuple(f"{section}." for section in OTHER_SECTIONS)
    flat = flat_keys(plain(config))
    return {key: value for key, value in flat.items() if not key.startswith(others)}


def flat_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config in plain types as on the command line (`optim.base_lr`)."""
    flat: dict[str, Any] = {}
    for section, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    return flat
