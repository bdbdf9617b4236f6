"""One writer per run folder."""

import errno
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from steps import before_step, train_with

from mae_et import UserError, pretrain
from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.errors import RunFailed
from mae_et.io import atomic
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import check_writable, sole_writer
from mae_et.monitoring.logger import RunLogger


def _lock(folder: Path) -> int | None:
    """Lock a folder in another process; return its exit status."""

    def lock() -> None:
        with sole_writer(folder):
            pass

    child = multiprocessing.get_context("fork").Process(target=lock)
    child.start()
    child.join()
    return child.exitcode


def test_other_processes_are_refused_until_the_writer_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with sole_writer(folder):
        assert _lock(folder) == 1
    assert _lock(folder) == 0


def test_missing_lock_support_is_not_reported_as_a_busy_folder(tmp_path: Path, monkeypatch) -> None:
    for code, sentence in (
        (errno.ENOLCK, "{key} .* cannot be locked: No"),
        (errno.EAGAIN, "another process is writing to {key} /"),
    ):

        def refused(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.lockf", refused)
        for named in ((), ("output",)):
            match = sentence.format(key=named[0] if named else "output.dir")
            with pytest.raises(UserError, match=match), sole_writer(tmp_path, *named):
                pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # Lustre mounted without flock

    monkeypatch.setattr("fcntl.lockf", refused)
    with pytest.warns(UserWarning, match="has no locks"), sole_writer(tmp_path) as check:
        check()


def test_unwritable_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "checkpoints")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} cannot be written to: File exists"):
            check_writable(tmp_path / name)


def test_lock_neither_follows_a_link_nor_truncates_its_target(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"\.lock is a link"), sole_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_atomic_write_does_not_follow_a_planted_link(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".a.json.{os.getpid()}.{atomic._MACHINE}.tmp").symlink_to(tmp_path / "victim")
    write_text_atomically(tmp_path / "a.json", "{}")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "{}"
    assert not (tmp_path / "a.json").is_symlink()

    (tmp_path / f".a.json.{os.getpid()}.{atomic._MACHINE}.tmp").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # planted again at once
    with pytest.raises(FileExistsError):
        write_text_atomically(tmp_path / "a.json", "{}")
    assert (tmp_path / "victim").read_text() == "precious"


def test_links_in_a_run_folder_lead_to_no_other_file(tiny, tmp_path: Path) -> None:
    """Whoever may write to the folder could have any file of this user truncated or written to."""
    config = tiny("--probe.every=50%")
    folder = config.output.dir
    folder.mkdir()
    names = ("metrics.jsonl", "plan.json", "events.out.tfevents.1.node.2.3", "unreadable.jsonl")
    for name in names:
        (tmp_path / f"precious {name}").write_text("precious\n")
        (folder / name).symlink_to(tmp_path / f"precious {name}")
    (folder / "scores.jsonl").symlink_to(tmp_path / "nowhere")
    pretrain(config, stop_after_step=2)
    assert [(tmp_path / f"precious {name}").read_text() for name in names] == ["precious\n"] * 4
    assert not (tmp_path / "nowhere").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def move(run: Path) -> None:
    run.rename(run.with_name("moved"))


def replace(run: Path) -> None:
    """As another run does that starts at the path of a deleted one."""
    shutil.rmtree(run)
    (run / "checkpoints").mkdir(parents=True)
    for name in (".lock", "metrics.jsonl"):
        (run / name).touch()


def delete_during_a_write(run: Path) -> None:
    shutil.rmtree(run)
    raise FileNotFoundError(2, "No such file or directory", "checkpoints/.step-00000010.pt.tmp")


def make_metrics_a_folder(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


def make_the_lock_a_link(run: Path) -> None:
    (run / ".lock").rename(run / "lock")
    (run / ".lock").symlink_to("lock")


FOLDER_CHANGES = [shutil.rmtree, move, replace, delete_during_a_write]
FILE_CHANGES = [
    lambda run: (run / "metrics.jsonl").unlink(),
    lambda run: (run / ".lock").unlink(),
    lambda run: os.truncate(run / "metrics.jsonl", 0),
    make_metrics_a_folder,
    make_the_lock_a_link,
]


@pytest.mark.parametrize("change", [*FOLDER_CHANGES, *FILE_CHANGES])
def test_run_ends_at_the_next_write_to_a_folder_that_went_away(
    tiny, change: Callable[[Path], None]
) -> None:
    config = tiny("--output.tensorboard=false")
    folder = config.output.dir
    with pytest.raises(RunFailed, match="was deleted, moved, replaced or truncated while this"):
        train_with(before_step(7, lambda: change(folder)), config)
    assert not (folder / "results.json").exists()
    steps = [checkpoint_step(path) for path in list_checkpoints(folder / "checkpoints")]
    assert steps == ([] if change in FOLDER_CHANGES else [5])


def test_move_is_named_where_closing_tensorboard_fails_of_it_too(tiny, monkeypatch) -> None:
    def close(logger: RunLogger) -> None:
        raise FileNotFoundError(2, "No such file or directory", "events.out.tfevents")

    monkeypatch.setattr(RunLogger, "close", close)
    config = tiny("--output.tensorboard=false")
    with pytest.raises(RunFailed, match="was deleted, moved, replaced or truncated while this"):
        train_with(before_step(7, lambda: move(config.output.dir)), config)
