"""Parse YAML of untrusted files and flags in time linear in its length."""

import re
from typing import Any

import yaml

MAX_CHARACTERS = 100_000
MAX_DEPTH = 32


class MisreadError(yaml.YAMLError):
    """YAML reads a value otherwise than its writer meant."""


def parse_yaml(text: str) -> Any:
    """Return the plain values in a YAML document.

    Aliases are refused: a dozen of them expand to more than fits in memory. So are long and deeply
    nested documents, in which PyYAML takes quadratic time; and what YAML reads otherwise than its
    writer meant: keys given twice (the last one counts), octal numbers (0100 is 64) and times (1:30
    is 90).

    Raises:
        yaml.YAMLError: the text is not YAML, or one of the above.
        ValueError: a value is out of the range of its type.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"longer than {MAX_CHARACTERS} characters")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are refused (*{event.anchor})")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
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
            # A key such as 96:2 lacks a space, which the parser says.
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
