"""NumPy files are checked before they are mapped."""

from pathlib import Path

import numpy as np
import pytest

from mae_et.data.arrays import read_array


def test_npy_file_with_a_wrong_length_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10))
    assert read_array(tmp_path / "a.npy").tolist() == list(range(10))
    content = (tmp_path / "a.npy").read_bytes()
    for lie in (content[:-8], content.replace(b"(10,)", b"(10**9,)"), b"", b"PK\3\4"):
        (tmp_path / "a.npy").write_bytes(lie)
        with pytest.raises((ValueError, OSError)):
            read_array(tmp_path / "a.npy")
