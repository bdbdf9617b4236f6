"""The record of a run's jobs."""

from pathlib import Path

from slurm.events import events_file, read_events, record_event, this_job
from slurm.run_status import find_runs


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
