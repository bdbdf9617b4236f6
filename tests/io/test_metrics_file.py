"""Records of a run, also of earlier versions."""

import warnings
from pathlib import Path

import pytest

from mae_et.io.metrics_file import METRICS, SCORES, read_metrics, row_line


def test_validation_scores_of_earlier_versions_have_their_current_names(tmp_path: Path) -> None:
    old = {"step": 5, "top1": 70.0, "loss": 2.0, "raw_loss": 2.5, "images": 300}
    new = {"step": 5, "top1": 70.0, "val_loss": 2.0, "raw_val_loss": 2.5, "val_images": 300}
    probe = {"step": 5, "knn": 20.0, "train_images": 50, "val_images": 100}
    (tmp_path / SCORES).write_text("".join(row_line(row, SCORES) for row in (old, new, probe)))
    assert read_metrics(tmp_path, SCORES) == [new, new, probe]


def test_only_a_half_written_last_line_is_skipped_silently(tmp_path: Path) -> None:
    whole = "".join(row_line({"step": step}, METRICS) for step in (1, 2))
    (tmp_path / METRICS).write_text(whole + whole[:5])
    with warnings.catch_warnings(action="error"):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    (tmp_path / METRICS).write_text(whole[1:])
    with pytest.warns(UserWarning, match="skipped line 1$"):
        assert [row["step"] for row in read_metrics(tmp_path)] == [2]
