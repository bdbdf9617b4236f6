"""Files are written completely or not at all, and killed writers leave nothing behind."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from mae_et.io.atomic import write_atomically, write_text_atomically


def _die(temporary: Path) -> None:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_is_deleted_by_the_next_writer_of_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a[1].json"
    write_text_atomically(path, "old")
    killed = multiprocessing.get_context("fork").Process(target=write_atomically, args=(path, _die))
    killed.start()
    killed.join()
    (left,) = tmp_path.glob(".*.tmp")
    assert left.read_text() == "half"
    assert path.read_text() == "old"
    running = left.with_name(left.name.replace(f".{killed.pid}.", f".{os.getppid()}."))
    elsewhere = left.with_name(f".{path.name}.{killed.pid}.0123abcd.tmp")
    other = left.with_name(left.name.replace("a[1]", "b"))
    for kept in (running, elsewhere, other):
        kept.write_text("another writer's")
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert not left.exists()
    assert all(kept.exists() for kept in (running, elsewhere, other))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    with pytest.raises(OSError, match="full"):
        write_atomically(path, lambda temporary: _fail(temporary))
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def _fail(temporary: Path) -> None:
    temporary.write_text("half")
    raise OSError("the disk is full")
