"""The table of goals says what was measured, and does not judge what was not."""

import json
from pathlib import Path

import pytest
from mae_et.benchmarks.gpu_goals import by_bandwidth, main

SAID = """
== python -m mae_et.benchmarks.variants default pretrain (at most 150 s)
mae-et: a library is missing
== python -m mae_et.benchmarks.variants default pretrain (at most 150 s)
mae-et: images are decoded by the GPU (efficiency.decode auto): TorchCodec 14,863 images/s at 224
mae-et: 14,863 images/s at 224 px (about 5,945 beside training), 16 loader processes 2,470
mae-et: compiled for bandwidth 96 in 9.5 s
mae-et: compiled for bandwidth 160 in 10.5 s
== python -m mae_et.benchmarks.variants own pretrain (at most 90 s)
mae-et: compiled for bandwidth 96 in 100.0 s
"""


def row(bandwidth: int, seconds: float, speed: float, wait: float) -> dict[str, float]:
    figures = {"images_per_second": speed, "data_time_fraction": wait}
    return {"step": 1, "bandwidth": bandwidth, "window_seconds": seconds, **figures}


def cells(out: Path) -> dict[str, list[str]]:
    main([str(out)])
    lines = (out / "goals.md").read_text().splitlines()
    return {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines}


def test_nothing_is_judged_before_it_is_measured(tmp_path: Path) -> None:
    main([str(tmp_path)])
    text = (tmp_path / "goals.md").read_text()
    assert text.count("| not measured | - |") == 7
    assert "**no**" not in text


def test_goals_are_compared_with_partial_figures(tmp_path: Path) -> None:
    """And with the rows of a run that did not end, without those in which blocks compile."""
    run = tmp_path / "run"
    run.mkdir()
    rows = [row(96, 50, 10, 0.0), row(96, 1, 6000, 0.5), row(96, 1, 8000, 0.7), row(224, 9, 9, 0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    step = {"bandwidth": 224, "micro_batch": 512, "compiled": False, "images_per_second": 3400.0}
    training = [
        step | {"reference": True},
        step | {"images_per_second": 5500.0, "compiled": True},
        step | {"bandwidth": 96, "micro_batch": 64, "compiled": True, "images_per_second": 9561.0},
    ]
    (tmp_path / "node.partial.json").write_text(json.dumps({"training": training}))
    (tmp_path / "log.txt").write_text(SAID)
    tests = [{"test": "a", "outcome": "failed"}, {"test": "a", "outcome": "passed"}]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tests) + "{")
    main([str(tmp_path), "default", str(run)])
    found = cells(tmp_path)
    assert found["loading plain JPEGs, exact crop, alone, images/s at 96 / 160 / 224"][1:] == [
        "14,863 / 14,863 / 14,863", "**no** |"
    ]  # fmt: skip
    assert found["share of time waiting for data at 96"][1:] == ["0.60", "**no** |"]  # already
    assert found["224 px, compiled, against the plain reference"][1:] == ["1.62", "**no** |"]
    assert found["96 px, 64 images a step, images/s"][1:] == ["9,561", "yes |"]
    at_two = "compilation at 2 bandwidths, s (first run, empty cache)"
    assert found[at_two][1:] == ["20", "- |"]  # another bandwidth may take the goal's 30 s
    assert found["tests that passed (of 1 that ran; failed: -)"][1:] == ["1", "yes |"]
    assert "images are decoded by the GPU (efficiency.decode auto): TorchCodec 14,863" in str(found)
    assert found["default"] == ["96", "7,000", "0.60", "no |"]
    kept = json.loads((tmp_path / "run.json").read_text())["default"]
    assert by_bandwidth(kept) == {96: pytest.approx((7000, 0.6))}


@pytest.mark.parametrize(("bandwidths", "met"), [((96, 160, 224), "yes |"), ((96, 160), "- |")])
def test_a_goal_of_all_bandwidths_is_met_once_all_are_measured(
    tmp_path: Path, bandwidths: tuple[int, ...], met: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [row(bandwidth, 1, 9000, 0.01) for bandwidth in bandwidths for _ in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    said = [f"mae-et: compiled for bandwidth {bandwidth} in 9.9 s" for bandwidth in bandwidths]
    (tmp_path / "log.txt").write_text("\n".join(["== .variants default pretrain", *said]))
    main([str(tmp_path), "default", str(run)])
    judged = {row[0]: row[1:] for row in map(list, cells(tmp_path).values()) if len(row) == 3}
    assert judged["<= 0.02"][1] == judged["<= 30"][1] == met
