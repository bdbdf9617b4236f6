"""A search of seconds."""

from pathlib import Path

import pytest
from searches import SMALL

from mae_et import load_config
from mae_et.search.config import SearchConfig


@pytest.fixture
def small(tiny_yaml: Path, tmp_path: Path):
    """Return a function that builds a search of seconds, with flags on top."""

    def build(*flags: str) -> SearchConfig:
        given = [f"--output.dir={tmp_path / 'search'}", *SMALL, *flags]
        return load_config(SearchConfig, [tiny_yaml], given)

    return build
