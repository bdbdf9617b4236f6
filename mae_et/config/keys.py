"""What may be done with a key of a config, declared beside its default."""

from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_type_hints

T = TypeVar("T")
Mark = Literal[
    "resume",  # may change when a run resumes, and so in a branch
    "move",  # may change when a run with a checkpoint resumes: what it names is compared itself
    "branch",  # may change in a branch (`branch_from`)
    "extend",  # may change in an extension (`init.extends`)
    "search",  # may change when a search resumes, besides those of resume and move
    "origin",  # how images are found, or where a run comes from: no change of settings
    "rank",  # may differ between ranks: paths and cores of nodes
    "source",  # defines the dataset, not its augmentation
    "statistics",  # how images are normalised, and cropped for evaluation
    "view",  # how training reads and augments images
    "common",  # shown by --help
]


def key(default: T, *marks: Mark) -> T:
    """Return a field of a config with marks; one without decides numbers, and may not change.

    Fields of subclasses that replace it keep its marks.
    """
    return field(default=default, metadata={"marks": marks})


def marked_keys(kind: type[Any], *marks: Mark) -> tuple[str, ...]:
    """Return the keys of a kind of config with any of the marks, as on the command line."""
    found: list[str] = []
    types = get_type_hints(kind)
    for each in fields(kind):
        section = types[each.name]
        if isinstance(section, type) and is_dataclass(section):
            found += [f"{each.name}.{name}" for name in marked_keys(section, *marks)]
        elif not marks_of(kind, each.name).isdisjoint(marks):
            found.append(each.name)
    return tuple(found)


def marks_of(kind: type[Any], name: str) -> set[Mark]:
    """Return the marks of a field, those of its base classes included."""
    replaced = (getattr(base, "__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return {mark for each in replaced if each for mark in each.metadata.get("marks", ())}
