"""Arrays and pickles of unknown origin load without executing anything."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mae_et.data.untrusted import load_arrays, read_array


def test_npy_file_with_a_wrong_length_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10))
    assert read_array(tmp_path / "a.npy").tolist() == list(range(10))
    content = (tmp_path / "a.npy").read_bytes()
    for lie in (content[:-8], content.replace(b"(10,)", b"(10**9,)"), b"", b"PK\3\4"):
        (tmp_path / "a.npy").write_bytes(lie)
        with pytest.raises((ValueError, OSError)):
            read_array(tmp_path / "a.npy")


def test_pickle_of_arrays_loads_and_any_other_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for protocol in (0, 2):  # later protocols build arrays differently
        path.write_bytes(pickle.dumps({"a": np.arange(3), "b": [1, "x"]}, protocol))
        with path.open("rb") as file:
            assert load_arrays(file, encoding="latin1")["a"].tolist() == [0, 1, 2]
    path.write_bytes(pickle.dumps(Path("x")))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="pathlib"):
        load_arrays(file)
