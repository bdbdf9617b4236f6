"""Text and JSON files of a run folder: read, or refused in a sentence."""

from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.plain_files import read_mapping, read_text


def test_text_and_json_objects_are_read_or_refused(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", '{"a": 1}')
    assert read_mapping(tmp_path / "a.json") == {"a": 1}
    for content in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json"):
            read_mapping(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "gone")
