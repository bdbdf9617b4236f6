"""`mae-et status` from a run folder alone."""

import json
import time
from pathlib import Path

import pytest

from slurm.events import record_event
from slurm.run_status import as_dicts, status, table


def test_status_is_json_serialisable(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("slurm.squeue.run", lambda *_: None)
    record_event(tmp_path, "started", job="7")
    (about,) = json.loads(json.dumps(as_dicts(status([tmp_path]))))
    assert about["run"] == str(tmp_path)


@pytest.mark.parametrize("key", ["seconds", "compute", "loss", "time"])
@pytest.mark.parametrize("value", ["Infinity", "NaN", "1" + "0" * 400])
def test_status_skips_metric_rows_with_non_finite_values(tmp_path: Path, key, value) -> None:
    """A flipped bit can write such a value, and the remaining time is computed from it."""
    row = {"step": 1, "stage": 0, "time": time.time(), "seconds": 1.0, "compute": 0.5}
    lost = json.dumps(row | {"step": 2, key: 0}).replace(f'"{key}": 0', f'"{key}": {value}')
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{lost}\n{'[' * 100_000}\n{{}}\n")
    with pytest.warns(UserWarning, match="skipped line 3"):
        (found,) = status([tmp_path])
    assert (found.state, found.step, round(found.eta or 0)) == ("running", 1, 1)
    assert "0:00:01" in table([found])


def test_status_shows_the_last_score(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    rows = [
        {"step": 0, "knn": 14.4},
        {"step": 5, "knn": 25.9, "effective_rank": 9.0, "ridge": None},
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = status([tmp_path])
    assert found.scores == {"knn": 25.9, "effective_rank": 9.0}
    assert "kNN 25.9 %" in table([found])
