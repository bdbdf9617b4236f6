"""The record of a run's jobs."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from slurm import retry
from slurm.events import events_file, read_events, record_event, this_job
from slurm.run_status import find_runs


def test_job_of_the_run_that_a_folder_was_copied_from_is_not_its_own(tmp_path: Path) -> None:
    """Its job, shown as running, would be the one to cancel. A moved run keeps its job."""
    run = tmp_path / "run"
    for folder in (run, run / "knn"):
        record_event(folder, "submitted", job="7", logs=str(run / "slurm"))
        record_event(folder, "started", job="7")
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "link").symlink_to(run)
    for name, jobs in (("run", 2), ("link", 2), ("copy", 1)):
        assert [len(read_events(tmp_path / name / part)) for part in ("", "knn")] == [jobs, jobs]
    record_event(run, "submitted", job="8", logs="/" + "x" * 5000)  # cannot be looked up
    assert read_events(run)[-1]["job"] == "8"
    run.rename(tmp_path / "moved")
    assert len(read_events(tmp_path / "moved")) == 3


def test_job_whose_run_folder_was_moved_is_not_restarted(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["retry", str(tmp_path / "runs.json"), "3", "1"])
    with pytest.raises(SystemExit, match="3"):
        runpy.run_path(retry.__file__, run_name="__main__")
    assert "runs.json was moved or deleted" in capsys.readouterr().err


def test_events_record_the_job_and_its_restarts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert this_job() == {"job": "4_2", "restart": 1}
    record_event(tmp_path, "started")
    assert events_file(tmp_path).is_file()
    assert read_events(tmp_path)[0]["job"] == "4_2"
    assert find_runs(tmp_path.parent)  # in the parent folder
