"""One writer per run folder."""

import errno
import os
from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.io.lock import check_writable, sole_writer


def test_missing_lock_support_is_not_reported_as_a_busy_folder(tmp_path: Path, monkeypatch) -> None:
    for code, sentence in ((errno.ENOLCK, "cannot be locked: No"), (errno.EAGAIN, "another proc")):

        def refused(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.lockf", refused)
        with pytest.raises(UserError, match=sentence), sole_writer(tmp_path):
            pass


def test_unwritable_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "checkpoints")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} cannot be written to: File exists"):
            check_writable(tmp_path / name)
