"""The log of trials: partial lines are dropped, and damage is reported."""

from pathlib import Path

import pytest
from flipped import flipped

from mae_et import UserError
from mae_et.search.trial_log import TrialLog, truncate_partial_line


def test_the_log_drops_the_partial_line_of_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path).append({"trial": "a", "value": 1})
    with path.open("a") as file:
        file.write('{"trial": "b", "va')
    log = TrialLog(path)
    log.append({"trial": "c", "value": 2})
    assert [record["trial"] for record in TrialLog(path).records] == ["a", "c"]
    truncate_partial_line(tmp_path / "none")


def test_a_damaged_log_is_reported_with_the_trials_that_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    log = TrialLog(path)
    for number in range(3):
        log.append({"trial": f"t{number}", "value": 10.5 + number, "bandwidths": [16, 32]})
    lines = path.read_bytes().splitlines(keepends=True)
    for bit in range(0, 8 * (len(lines[1]) - 1), 17):
        path.write_bytes(lines[0] + flipped(lines[1], bit) + lines[2])
        with pytest.raises(UserError, match=rf"{path} is damaged at line 2 of \d .*head -n 1"):
            TrialLog(path)
    for damage in (b"[1]\n", b"\xff\n", b"\n", b'{"trial": "x", "value": 99}\n'):
        path.write_bytes(lines[0] + damage + lines[1])
        with pytest.raises(UserError, match="is damaged at line 2 of 3"):
            TrialLog(path)
    path.write_bytes(lines[0])  # what the sentence advises
    assert [record["trial"] for record in TrialLog(path).records] == ["t0"]
