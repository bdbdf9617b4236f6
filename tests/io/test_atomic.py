"""Files are written completely or not at all, and killed writers leave nothing behind."""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import GOLDEN

from mae_et.cli.main import main
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


def test_a_name_of_the_longest_kind_is_written_and_no_pipe_or_device_replaced(
    tmp_path: Path,
) -> None:
    write_text_atomically(tmp_path / ("x" * 255), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/of-no-driver")):
        with pytest.raises(OSError, match="it is a device or a pipe"):
            write_text_atomically(path, "text")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    with pytest.raises(OSError, match="full"):
        write_atomically(path, lambda temporary: _fail(temporary))
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_a_failed_flush_names_the_file_and_a_folder_need_not_be_flushed(
    tmp_path: Path, monkeypatch
) -> None:
    flushed, path = [], tmp_path / "a.json"

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flushed.append((is_folder, path.exists()))
        failed = errno.EINVAL if is_folder else of_files
        if failed:
            raise OSError(failed, os.strerror(failed))

    monkeypatch.setattr(os, "fsync", fsync)
    of_files = 0
    write_text_atomically(path, "new")
    assert flushed == [(False, False), (True, True)]  # the file before it is renamed
    of_files = errno.EIO
    with pytest.raises(OSError, match=r"'/.*a\.json'"):
        write_text_atomically(path, "newer")
    with pytest.raises(FileNotFoundError, match=r"'/.*/a\.json'"):
        write_atomically(path, Path.unlink)  # a user deletes the temporary file
    assert path.read_text() == "new"


def test_a_folder_that_became_a_file_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"

    def replace(temporary: Path) -> None:
        path.parent.rename(tmp_path / "moved")
        path.parent.touch()

    with pytest.raises(NotADirectoryError, match=r"'/.*/a\.json'"):
        write_atomically(path, replace)


def _fail(temporary: Path) -> None:
    temporary.write_text("half")
    raise OSError("the disk is full")


WEIGHTS = [f"--checkpoint={GOLDEN / 'mae_tiny_released_format.pth'}", "--encoder_num_heads=3"]
COMMANDS = {
    "export": [*WEIGHTS, "--decoder_num_heads=4", "--format=hf", "--output=out/hf"],
    "prepare": ["--data.root=data", "--splits=[train]", "--levels=[16]", "--shard_images=2",
                "--output=out/shards"],
    "embed": [*WEIGHTS, "--data.name=synthetic", "--data.synthetic_train=8", "--num_workers=0",
              "--data.synthetic_val=8", "--device=cpu", "--output=out/features.safetensors"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("write", [1, 3])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_command_leaves_nothing_behind_once_it_is_repeated(
    place: Path, name: str, write: int
) -> None:
    """And the same bytes, whichever of its files it was writing."""
    for number in range(4):
        path = place / "data" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 48), number).save(path)

    def die_in_a_write() -> None:
        calls = itertools.count(1)
        real = os.fsync
        os.fsync = lambda file: os.kill(os.getpid(), 9) if next(calls) == write else real(file)
        main([name, *COMMANDS[name]])

    found = []
    for killed in (False, True):
        shutil.rmtree(place / "out", ignore_errors=True)
        if killed:
            child = multiprocessing.get_context("fork").Process(target=die_in_a_write)
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        assert main([name, *COMMANDS[name]]) == 0
        files = [path for path in (place / "out").rglob("*") if path.is_file()]
        found.append({str(path): path.read_bytes() for path in files})
    assert found[0] == found[1]
