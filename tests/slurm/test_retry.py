"""What the follow-up job reads about the one that ended."""

from pathlib import Path

from slurm import retry
from slurm.events import log_file, read_events, record_event


def test_srun_error_line_names_the_killed_task(tmp_path: Path) -> None:
    record_event(tmp_path, "submitted", job="7", logs=str(tmp_path / "slurm"))
    events = read_events(tmp_path)
    path = log_file(tmp_path, events, "7")
    assert path == tmp_path / "slurm" / "7_0_log.err"
    assert retry.killed_task(tmp_path, "7", events) == ""
    path.write_text("srun: error: n1: task 0: Killed\nsrun: error: n1: task 1: Terminated\n")
    assert retry.killed_task(tmp_path, "7", events) == "n1: task 0: Killed"
