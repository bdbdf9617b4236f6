"""Parse YAML of untrusted files and flags in time linear in its length."""

from typing import Any

import yaml

MAX_CHARACTERS = 100_000
MAX_DEPTH = 32


def parse_yaml(text: str) -> Any:
    """Return the plain values in a YAML document.

    Aliases are refused: a dozen of them expand to more than fits in memory. So are long and deeply
    nested documents, in which PyYAML takes quadratic time.

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
    return yaml.safe_load(text)
