"""Pickles of arrays load without executing anything."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mae_et.data.plain_pickle import load


def test_pickle_of_arrays_loads_and_any_other_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for protocol in (0, 2):  # later protocols build arrays differently
        path.write_bytes(pickle.dumps({"a": np.arange(3), "b": [1, "x"]}, protocol))
        with path.open("rb") as file:
            assert load(file, encoding="latin1")["a"].tolist() == [0, 1, 2]
    path.write_bytes(pickle.dumps(Path("x")))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="pathlib"):
        load(file)
