"""Full, read-only and slow disks: a one-line error, and the run resumes from a checkpoint."""

import importlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import QUIET, run, same_weights

from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint, save_checkpoint
from mae_et.io.metrics_file import read_metrics


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, whose size can be changed; skipped where none can be mounted.

    Config and log of a run lie beside its folder: not on this disk.
    """
    place = tmp_path / "run"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "run"
    code, said = run(folder, "none")
    assert code == 0, said
    return folder


def is_one_line_error(said: str, what: str) -> bool:
    """Return whether the last line contains `what`, without a traceback above it."""
    return what in said.strip().splitlines()[-1] and "Traceback" not in said


@pytest.mark.faults
def test_run_on_a_full_disk_fails_with_one_error_line_and_resumes_once_there_is_space(
    disk, clean
) -> None:
    """At 12 sizes: the log, a checkpoint, an image or the event file fills the disk."""
    ended: list[str] = []
    for kibibytes in (8, 32, 100, 300, 520, 540, 700, 1000, 1060, 1100, 1300, 1560):
        mount("-o", f"remount,size={kibibytes}k", str(disk))
        code, said = run(disk, "none")
        assert code == 1, (kibibytes, said)
        assert is_one_line_error(said, "No space left on device"), said
        assert "the same command resumes from there" in said
        saved = newest_checkpoint(disk / "checkpoints")
        ended.append(f"{kibibytes} KiB: step {saved['step'] if saved else 0}")
        assert not list(disk.glob("checkpoints/.*.tmp"))
        mount("-o", "remount,size=64m", str(disk))
        if kibibytes in {520, 1300}:  # resume from what is there; otherwise start anew
            assert run(disk, "none")[0] == 0
            assert same_weights(disk, clean)
            losses = [[(r["step"], r["loss"]) for r in read_metrics(f)] for f in (clean, disk)]
            assert losses[0] == losses[1]
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"\nfull at {', '.join(ended)}")


@pytest.mark.parametrize("limit", [1, 64, 5000, 32_768, 100_000, 300_000])
def test_checkpoint_beyond_the_file_size_limit_raises_the_reason(tmp_path, limit) -> None:
    """Torch itself reports an internal error; the previous checkpoint stays."""
    from train_state import state

    save_checkpoint(tmp_path, state(1).to_dict(), "seed: 0", {"plan": 1})
    second = state(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, second.to_dict(), "seed: 0", {"plan": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert newest_checkpoint(tmp_path)["step"] == 1


@pytest.mark.faults
def test_run_beyond_the_file_size_limit_reports_the_reason_and_resumes(tmp_path) -> None:
    """RLIMIT_FSIZE, which needs no file system of its own."""
    folder = tmp_path / "run"
    flags = [*QUIET, "--curriculum.epochs=1.5"]
    limit = 100_000

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, said = run(folder, "none", *flags, before=bound)
    assert code == 1
    assert is_one_line_error(said, "File too large; what was saved is kept"), said
    assert list_checkpoints(folder / "checkpoints") == []
    code, said = run(folder, "none", *flags)
    assert code == 0, said


@pytest.mark.faults
def test_read_only_folder_is_refused_before_training(disk) -> None:
    """For a new run and for one to resume."""
    for held in (False, True):
        if held:
            assert run(disk, "die:step=12", *QUIET)[0] == -9
        mount("-o", "remount,ro", str(disk))
        code, said = run(disk, "none", *QUIET)
        assert code == 2
        assert is_one_line_error(said, "cannot be written to: Read-only file system"), said
        assert "step 2/" not in said
        mount("-o", "remount,rw", str(disk))
    assert newest_checkpoint(disk / "checkpoints")["step"] == 10
    assert run(disk, "none", *QUIET)[0] == 0


@pytest.mark.faults
def test_folder_of_another_user_is_refused_before_training(tmp_path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can run as somebody else")
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent != Path(parent.root):
            parent.chmod(parent.stat().st_mode | 0o055)
    (tmp_path / "run").mkdir()
    log = tmp_path / "run-0.log"
    log.touch()
    log.chmod(0o666)

    def become_another_user() -> None:
        # Imported first, because Python's own folder may be readable by root only.
        for name in ("mae_et.cli.main", "mae_et.pretraining"):
            importlib.import_module(name)
        os.setuid(65534)

    code, said = run(tmp_path / "run", "none", *QUIET, before=become_another_user)
    assert code == 2
    assert is_one_line_error(said, "cannot be written to: Permission denied"), said


@pytest.mark.faults
def test_slow_disk_changes_no_result(tmp_path, clean) -> None:
    """One second per file: longer than the time-out in total, with a heartbeat in between."""
    began = time.monotonic()
    code, said = run(tmp_path / "run", "slow_disk:seconds=1", "--efficiency.step_timeout=10")
    assert code == 0, said
    assert time.monotonic() - began > 15
    assert same_weights(tmp_path / "run", clean)
    speeds = [row["seconds"] for row in read_metrics(tmp_path / "run")]
    assert speeds[-1] < (time.monotonic() - began) / 2  # writing is not counted as training
