"""Text and JSON files of a run folder: read, or refused in a sentence."""

import os
from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.plain_files import append_line, read_mapping, read_text


def test_text_and_json_objects_are_read_or_refused(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", '{"a": 1}')
    assert read_mapping(tmp_path / "a.json") == {"a": 1}
    for content in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json"):
            read_mapping(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "gone")


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot be read: .*not a regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        append_line(tmp_path / "pipe", "{}\n")


def test_lines_are_appended_to_the_record_itself_and_to_no_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "record")
    for line in ("1\n", "2\n"):
        append_line(tmp_path / "record", line)
    with pytest.raises(UserError, match="link is a link; delete it"):
        append_line(tmp_path / "link", "3\n")
    assert (tmp_path / "record").read_text() == "1\n2\n"
