"""Parse YAML, and refuse values that YAML reads differently than their writer meant."""

import re
from typing import Any

import yaml


class MisreadError(yaml.YAMLError):
    """A value that YAML reads differently than its writer meant."""


def parse_yaml(text: str) -> Any:
    """Return the plain values in a YAML document.

    Raises:
        MisreadError: a key is given twice (the last one counts), or a number is octal (0100 is 64)
            or a time (1:30 is 90).
        yaml.YAMLError: the text is not YAML.
        ValueError: a value is out of the range of its type.
        RecursionError: it is nested too deeply, or contains itself.
    """
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _check_node(node)
    return loader.construct_document(node)


def _check_node(node: yaml.Node, is_key: bool = False) -> None:
    """Refuse keys given twice, octal numbers and times, by `MisreadError`."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}:
            octal = re.fullmatch(r"[-+]?0[0-7_]+", node.value)
            # A key such as 96:2 lacks a space, which the parser reports.
            if octal or (":" in node.value and not is_key):
                line, kind = node.start_mark.line + 1, "an octal" if octal else "a base-60"
                raise MisreadError(
                    f"line {line}: {node.value:.40} is {kind} number in YAML; put text in quotes"
                )
        return
    lines: dict[str, int] = {}
    for item in node.value:
        if not isinstance(node, yaml.MappingNode):
            _check_node(item)
            continue
        for place, part in enumerate(item):
            _check_node(part, is_key=place == 0)
        if isinstance(item[0], yaml.ScalarNode):
            name, line = item[0].value, item[0].start_mark.line + 1
            if name in lines:
                raise MisreadError(f"{name} is given twice, in lines {lines[name]} and {line}")
            lines[name] = line
