"""Reword the config parser's errors for users."""

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from mae_et.config.key_checks import type_of
from mae_et.config.suggestions import keys_of, suggest_key
from mae_et.errors import one_line

TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false",
    "str": "text (in quotes)", "tuple": "a list such as [1, 2]", "list": "a list such as [1, 2]",
    "dict": "a mapping such as {96: 2}", "pathlib.Path": "a path",
}  # fmt: skip
_WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Expected a (?P<types>.+?)\. Got value: (?P<value>.*)'
)
# jsonargparse fails to describe a mapping with a null, such as {96:2} without a space.
_WRONG_MAPPING = re.compile(
    r'Parser key "(?P<key>[\w.]+)": unsupported operand type\(s\) for \+: \'int\' and \'str\''
)
_WRONG_UNION = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(?P<types>.+)\] Errors: .* Given value type: \w+ Given value: (?P<value>.*)"
)
# A section that may be null, such as data of mae-et knn; its types are in either order.
_WRONG_SECTION = re.compile(
    r'(?:Parser key "(?P<key>[\w.]+)": )?Does not validate against any of the Union subtypes '
    r"Subtypes: \[(?:NoneType, )?[\w.]+Config(?:, NoneType)?\] Errors: (?:- Expected a NoneType )?"
    r"- (?:Problem with given class_path '[\w.]+': )?(?P<inner>.*) Given value type: .*"
)
# An item of a list of sections, such as curriculum.stages.
_WRONG_ITEM = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Problem with given class_path \'[\w.]+\': (?P<inner>.*)'
)
# Errors of jsonargparse for an invalid config, and of checks for unusual numbers.
REFUSALS = (ArgumentError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError)


def in_flags(sentence: str, parser: ArgumentParser, kind: type[Any], words: list[str]) -> str:
    """Name missing flags as they are typed, and suggest a flag for an unknown one."""
    absent = re.fullmatch(r"the following arguments are required: (.+)", sentence)
    if absent:
        flags = {a.dest: (*a.option_strings, str(a.metavar))[0] for a in parser._actions}
        return f"{', '.join(flags[name] for name in absent[1].split(', '))} must be given"
    section = re.fullmatch(r"there is no key ([\w.]+)", sentence)
    if section:
        return sentence + suggest_key(section[1], list(keys_of(kind)))
    unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", sentence)
    if not unknown:
        return sentence
    options = [option for action in parser._actions for option in action.option_strings]
    given = {word.partition("=")[0] for word in words}
    needed = (action.option_strings for action in parser._actions if action.required)
    missing = [options[0] for options in needed if options and given.isdisjoint(options)]
    required = f"; {', '.join(missing)} must be given" if missing else ""
    meant = suggest_key(unknown[1], options) or required
    if unknown[1] == "--data.root" and "--images" in options:
        meant = "; images come after --images"
    return f"there is no flag {unknown[1]}{meant}"


def one_sentence(error: BaseException | str, config: Any = None) -> str:
    """Put a parser's message on one line, with types in a user's words: those of a kind of config.

    A list of words is suggested as such (`[fp32, bf16]`) if the kind is given.
    """
    message = re.sub(r"<class '([\w.]+)'>|typing\.(?=Literal)", r"\1", one_line(error))
    section = _WRONG_SECTION.fullmatch(message) or _WRONG_ITEM.fullmatch(message)
    if section:
        key, inner = section["key"], section["inner"].removesuffix(" - Expected a NoneType")
        option = re.fullmatch(r"Option '(\w+)(?::(.*))?' is not accepted", inner)
        if option and option[2]:
            return f"{key}: write `{option[1]}: {option[2]}`, with a space"
        if option:
            return f"there is no key {key}.{option[1]}"
        return one_sentence(inner.replace('Parser key "', f'Parser key "{key}.', 1), config)
    mapping = _WRONG_MAPPING.fullmatch(message)
    if mapping:
        return f"{mapping['key']}: write {TYPES['dict']}, with a space after each colon"
    wrong = _WRONG_TYPE.fullmatch(message) or _WRONG_UNION.fullmatch(message)
    if not wrong:
        return message
    kinds = _kinds(wrong["types"])
    item = next(iter(get_args(type_of(wrong["key"], config))), None)
    if item is str or get_origin(item) is Literal:
        words = get_args(item) or (wrong["value"],)
        kinds = kinds.replace("[1, 2]", f"[{', '.join(words)}]")
    if dataclasses.is_dataclass(item):
        kinds = kinds.replace("[1, 2]", f"[{{{dataclasses.fields(item)[0].name}: 1}}]")
    return f"{wrong['key']} must be {kinds}, got {wrong['value']}"


def _kinds(types: str) -> str:
    """Describe types such as `int, Literal['auto'], NoneType`."""
    names = re.sub(r"\[.*?\]", "", types).split(", ")
    choices = ", ".join(re.findall(r"Literal\[(.*?)\]", types))
    others = (name for name in names if name not in {"Literal", "NoneType"})
    kinds = [TYPES.get(name, f"of type {name}") for name in others]
    if not kinds:
        return f"one of {choices}"
    return " or ".join([*kinds, choices] if choices else kinds)
