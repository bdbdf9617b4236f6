"""Files of one array, with a checksum."""

from pathlib import Path

import numpy as np
import pytest
from flipped import flipped

from mae_et.data.sources.array_files import read_array, write_array
from mae_et.io.seals import sealed_bytes


def test_npy_file_with_a_wrong_length_is_refused_whatever_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10))
    content = path.read_bytes()
    path.write_bytes(sealed_bytes(content))
    assert read_array(path).tolist() == list(range(10))
    for lie in (content[:-8], content.replace(b"(10,)", b"(10**9,)"), b"", b"PK\3\4"):
        path.write_bytes(sealed_bytes(lie))
        with pytest.raises((ValueError, OSError)):
            read_array(path)


def test_written_array_is_read_by_numpy_and_refused_after_any_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_array(path, np.arange(10))
    assert np.load(path).tolist() == list(range(10))
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 11):
        path.write_bytes(flipped(content, bit))
        with pytest.raises(ValueError, match="checksum"):
            read_array(path)
    np.save(path, np.arange(10))
    with pytest.raises(ValueError, match="it has no checksum"):
        read_array(path)
