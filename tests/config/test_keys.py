"""What may be done with a key is declared beside it."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from finetune.config import ClassifierConfig
from mae_et.config.data import DataConfig
from mae_et.config.keys import marked_keys, marks_of
from mae_et.config.schema import PretrainConfig
from mae_et.search.config import SearchConfig


@pytest.mark.parametrize("kind", [PretrainConfig, ClassifierConfig, SearchConfig])
def test_no_mark_is_forgotten_whose_lack_nothing_refuses(kind: type) -> None:
    """Without marks a key may not change. Datasets are inherited, and paths differ, by marks."""
    found = {"": kind, **get_type_hints(kind)}
    sections = {name: section for name, section in found.items() if is_dataclass(section)}
    paths = {
        f"{name}.{each.name}".lstrip(".")
        for name, section in sections.items()
        for each in fields(section)
        if Path in {each.type, *get_args(each.type)}
    }
    assert {"data.root", "branch_from", "output.dir"} < paths <= {*marked_keys(kind, "rank")}
    assert all(marks_of(DataConfig, each.name) for each in fields(DataConfig))


def test_fields_that_replace_others_keep_their_marks() -> None:
    one, other = (set(marked_keys(kind, "branch")) for kind in (PretrainConfig, ClassifierConfig))
    assert one == other >= {"seed", "optim.base_lr", "curriculum.epochs"}
