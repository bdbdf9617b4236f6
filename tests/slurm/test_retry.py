"""What the follow-up job reads about the one that ended."""

from pathlib import Path

import pytest

from slurm import retry
from slurm.events import START, log_file, read_events, record_event


@pytest.mark.parametrize(
    ("status", "messages", "expected"),
    [
        (1, [], ""),
        (137, ["n1: task 0: Killed", "n1: task 1: Terminated", "n2: task 2: Killed"], "n1: task 0"),
        (75, ["n1: task 0: Exited with exit code 75"], retry.HUNG),
        (137, ["n2: task 1: Killed", "n1: task 0: Exited with exit code 75"], retry.HUNG),
        (137, ["n1: tasks 0-1: Exited with exit code 75"], retry.HUNG),
        (137, ["n2: task 1: Killed", "n1: task 0: Exited with exit code 1"], "n2: task 1: Killed"),
    ],
)
def test_cause_is_read_from_srun_s_messages_in_any_order(
    tmp_path: Path, status: int, messages: list[str], expected: str
) -> None:
    record_event(tmp_path, "submitted", job="7", logs=str(tmp_path / "slurm"))
    events = read_events(tmp_path)
    path = log_file(tmp_path, events, "7")
    assert path == tmp_path / "slurm" / "7_0_log.err"
    assert retry.cause(tmp_path, "7", events, 1) == ""
    earlier = ["srun: error: n1: task 5: Killed", START]  # restarts append to the log
    path.write_text("\n".join([*earlier, *(f"srun: error: {line}" for line in messages), ""]))
    found = retry.cause(tmp_path, "7", events, status)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)
