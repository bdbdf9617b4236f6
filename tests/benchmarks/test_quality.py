"""The benchmark of quality: its arms, and its tables at equal accuracy."""

from pathlib import Path
from typing import Any

import pytest
from mae_et.benchmarks.quality import QualityConfig, arm_config
from mae_et.benchmarks.quality_table import (
    SCORES,
    STUDENT,
    cost_interval,
    draw,
    equal_accuracy,
    table,
)
from PIL import Image

from mae_et.cli.main import main
from mae_et.training.plan import make_plan


def test_equal_images_arm_trains_on_as_many_images_as_plain(
    photographs: Path, recipe: Path, tmp_path: Path
) -> None:
    config = QualityConfig(photographs, recipe=str(recipe), epochs=40)
    plain, etpp = (
        arm_config(config, name, 0, tmp_path / name) for name in ("plain", "etpp-equal-images")
    )
    assert make_plan(etpp, 32).images == pytest.approx(make_plan(plain, 32).images, rel=0.02)
    assert etpp.curriculum.epochs < 30


@pytest.mark.slow
def test_quality_matches_images_or_time_and_reuses_finished_arms(
    photographs: Path, recipe: Path, tmp_path: Path, last_json
) -> None:
    arms = [
        "untrained",
        "plain",
        "etpp-replay",
        "etpp-equal-images",
        "decoder-full",
        "decoder-cross-equal-time",
    ]
    command = [
        "bench", "quality", f"--root={photographs}", f"--recipe={recipe}",
        f"--folder={tmp_path / 'quality'}", f"--arms=[{','.join(arms)}]", "--epochs=4",
        "--fine_tune_epochs=1",
    ]  # fmt: skip
    assert main(command) == 0
    rows = {name: each[0] for name, each in last_json().items()}
    assert set(rows) == set(arms)
    assert rows["etpp-equal-images"]["images"] == pytest.approx(rows["plain"]["images"], abs=8)
    assert rows["etpp-equal-images"]["equivalent_epochs"] < rows["plain"]["equivalent_epochs"]
    # Half the depth on a third of the hidden patches is much faster, so it trains on more images.
    assert rows["decoder-cross-equal-time"]["images"] > rows["decoder-full"]["images"]
    assert all(0 <= row[score] <= 100 for row in rows.values() for score in SCORES)

    encoders = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert main(command) == 0
    assert {name: each[0] for name, each in last_json().items()} == rows
    assert {path: path.stat().st_mtime_ns for path in encoders} == encoders


def test_unknown_quality_arm_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["bench", "quality", f"--root={tmp_path}", "--arms=[plainer]"]) == 2
    assert "arms must be some of untrained, plain, plain-2x" in capsys.readouterr().err


def test_replay_arm_replays_the_smaller_bandwidths(photographs: Path, recipe: Path) -> None:
    config = QualityConfig(photographs, recipe=str(recipe), epochs=40)
    arm = arm_config(config, "etpp-replay", 0, Path("none"))
    shown = sorted({stage.bandwidth for stage in make_plan(arm, 32).stages})
    assert arm.data.replay == dict(zip(shown[:-1], (4, 2), strict=False))


def _figures(epochs: float, seconds: float, *scores: float) -> dict[str, Any]:
    costs = {"images": 64, "equivalent_epochs": epochs, "seconds": seconds}
    return costs | dict(zip(SCORES, scores, strict=True))


def test_equal_accuracy_interpolates_the_curve_of_plain_mae(tmp_path: Path) -> None:
    """Half the way from 2x to 4x is 2.83x on a logarithmic axis; beyond the curve only a bound."""
    rows = {
        "untrained": [_figures(0, 0, 25, 25, 25)],
        "plain": [_figures(4, 100, 29, 40, 50), _figures(4, 100, 31, 40, 50)],
        "plain-hog": [_figures(4, 150, 26, 63, 45)],
        "plain-hog-4x": [_figures(16, 600, 46, 67, 53)],
        "plain-2x": [_figures(8, 200, 34, 50, 60)],
        "plain-4x": [_figures(16, 400, 38, 60, 70)],
        "etpp-hog": [_figures(4, 200, 36, 65, 49)],
    }
    assert "| etpp-hog | 2.83x (1.41x) | > 4.00x (> 2.00x) | < 1.00x (< 0.50x) |" in (
        equal_accuracy(rows)
    )
    of_pixels, of_hog = equal_accuracy(rows).split("plain MAE with HOG")
    assert "| plain-hog | < 1.00x" in of_pixels
    # Half the way from 1x to 4x is 2x, of the same target.
    assert "| etpp-hog | 2.00x (1.50x) | 2.00x (1.50x) | 2.00x (1.50x) |" in of_hog
    assert of_hog.count("| plain") == 0
    assert "| plain | 2 | 64 | 4.00 | 100 s (1.00x) | 30.0 ± 1.4 | 40.0 ± 0.0 | 50.0 ± 0.0 |" in (
        table(rows)
    )
    busy = [_figures(4, seconds, 30, 40, 50) for seconds in (100, 101, 900)]
    assert "| 101 s (1.00x) |" in table({"plain": busy})
    assert equal_accuracy({"plain": rows["plain"], "etpp-hog": rows["etpp-hog"]}) == ""
    pytest.importorskip("matplotlib")
    draw(tmp_path / "quality.png", rows)
    with Image.open(tmp_path / "quality.png") as image:
        assert image.size == (1980, 960)


def test_interval_of_a_cost_is_that_of_students_t_test() -> None:
    """By hand: level at 2 of 1 and 4; a standard error of 1 / sqrt(3) each, weighed by the part."""
    stats = pytest.importorskip("scipy.stats")
    found = [stats.t.ppf(0.975, freedom) for freedom in range(1, len(STUDENT))]
    assert STUDENT[1:] == pytest.approx(found, abs=5e-4)
    costs, curve, goal = [1.0, 4.0], [[9.0, 10, 11], [109.0, 110, 111]], [59.0, 60, 61]
    least, most = cost_interval(costs, curve, goal) or (0, 0)
    half = STUDENT[2] * (1.5 / 3) ** 0.5 / 100  # half of each curve's variance, and the goal's
    assert (least, most) == pytest.approx((4 ** (0.5 - half), 4 ** (0.5 + half)), rel=2e-3)
    assert cost_interval(costs, curve, [9.0, 10, 11]) == pytest.approx((1, 4**0.035), rel=2e-3)
    assert cost_interval(costs, curve, [200.0, 201, 202]) is None
    assert cost_interval(costs, curve, goal[:1]) is None
