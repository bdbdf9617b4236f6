"""The hours of a plan follow from the speeds given."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_et import UserError
from mae_et.cli.main import main
from mae_et.curriculum.gpu_speed import GpuSpeed
from mae_et.curriculum.schedule import Curriculum
from mae_et.curriculum.speeds import read_speeds
from mae_et.curriculum.throughput import POWERS, throughput_model, throughput_table

PLAN = Curriculum.preset("etpp", 224, 16).plan(40, 100_000, 1024)
FLAT = "--throughput={96: 1, 160: 1, 224: 3}"


def model(speeds, *rest, **more):
    return throughput_model(
        PLAN, GpuSpeed({b: {1: each} for b, each in speeds.items()}), *rest, **more
    )


SPEED = st.floats(1, 1e5)
SPEEDS = st.fixed_dictionaries({96: SPEED, 160: SPEED, 224: SPEED})


@given(SPEEDS, st.floats(1.1, 10))
def test_hours_scale_with_speed_and_gpus_while_gpu_hours_stay(speeds, factor: float) -> None:
    slow = model(speeds)
    fast = model({b: speed * factor for b, speed in speeds.items()})
    assert [row["gpus"] for row in slow["totals"]] == list(POWERS)
    first = slow["totals"][0]
    for row, faster in zip(slow["totals"], fast["totals"], strict=True):
        assert row["hours"] * row["gpus"] == pytest.approx(first["hours"])
        assert row["gpu_hours"] == pytest.approx(first["gpu_hours"])
        assert row["hours"] == pytest.approx(faster["hours"] * factor)


@given(SPEEDS)
def test_hours_sum_images_divided_by_speed_over_stages(speeds) -> None:
    seconds = sum(s.steps * PLAN.batch_size / speeds[s.bandwidth] for s in PLAN.stages)
    found = model(speeds, (1,))["totals"][0]["hours"]
    assert found == pytest.approx(seconds / 3600)


def test_speeds_in_proportion_to_cost_take_the_time_of_a_constant_run() -> None:
    """Speed proportional to cost means that time is proportional to compute."""
    speeds = {stage.bandwidth: 1e12 / stage.cost for stage in PLAN.stages}
    found = model(speeds)
    assert found["time_against_constant"] == pytest.approx(1)
    for row in found["totals"]:
        assert row["constant_hours"] == pytest.approx(row["hours"])


@given(SPEEDS, SPEEDS, st.floats(0.1, 64))
def test_stage_is_as_fast_as_the_slower_of_gpu_and_loader(trained, loader, cores) -> None:
    found = model(trained, (1,), loader, cores)
    free = model(trained, (1,), loader)
    assert found["totals"][0]["hours"] >= free["totals"][0]["hours"] * (1 - 1e-9)
    for row in found["loading"]:
        b = row["bandwidth"]
        assert row["cores_needed_per_gpu"] == pytest.approx(trained[b] / loader[b])
        reached, slower = row["reached_images_per_second"], row["bottleneck"]
        assert reached == pytest.approx(min(trained[b], loader[b] * cores))
        assert slower == ("loader" if reached < row["images_per_second"] else "gpu")


def test_replay_makes_a_core_as_fast_as_its_images_are_used_often(capsys) -> None:
    trained, loader = {96: 300.0, 160: 200.0, 224: 100.0}, {96: 10.0, 160: 10.0, 224: 10.0}
    found = model(trained, (1,), loader, 15, replay={96: 2})
    faster = model(trained, (1,), loader | {96: 20.0}, 15)
    assert (found["loading"], found["totals"]) == (faster["loading"], faster["totals"])
    assert "each image used 2 times at 96" in throughput_table(found)
    flags = ["--throughput={96: 9, 160: 9, 224: 9}", "--loader={96: 1, 160: 1, 224: 1}"]
    assert main(["plan", "--json=true", "--images=50000", *flags, "--data.replay={96: 2}"]) == 0
    rows = json.loads(capsys.readouterr().out)["throughput"]["loading"]
    assert [row["cores_needed_per_gpu"] for row in rows] == [4.5, 9, 9]


def test_few_images_per_gpu_train_at_the_speed_measured_with_them(capsys) -> None:
    """16 and 64 images take 1 and 2 s: 32 take 4/3 s, and more than 64 are several passes."""
    given = "{96: {16: 16, 64: 32}, 160: 20, 224: 10}"
    flags = ["plan", "--images=100000", "--optim.batch_size=1024", "--curriculum.cost=area"]
    hours = []
    for speeds in (given, given.replace("{16: 16, 64: 32}", "24"), given.replace("16: 16, ", "")):
        assert main([*flags, f"--throughput={speeds}", "--gpus=8,16,32", "--json"]) == 0
        hours.append(
            [
                row["gpu_hours"]
                for row in json.loads(capsys.readouterr().out)["throughput"]["totals"]
            ]
        )
    fitted, slow, fast = hours
    assert fitted == pytest.approx([fast[0], fast[1], slow[2]])
    assert main([*flags, f"--throughput={given}", "--gpus=32"]) == 0
    assert "images/s of one GPU with 32 images a step" in capsys.readouterr().out


def test_gpu_count_that_does_not_divide_the_batch_has_no_hours() -> None:
    found = model({96: 3, 160: 2, 224: 1}, (3, 8))
    three, eight = found["totals"]
    assert three["hours"] is three["gpu_hours"] is three["images_per_gpu_and_step"] is None
    assert eight["images_per_gpu_and_step"] == 128
    table = throughput_table(found)
    assert "    3 the batch is not divisible by this number" in table
    assert "given: images/s of one GPU; the rest is computed" in table  # of steps of any size


def test_speeds_of_a_run_are_averaged_over_its_time(tmp_path) -> None:
    """300 images in 10 + 5 seconds."""
    stages = [(96, 200, 20.0), (96, 100, 20.0), (224, 10, 1.0)]
    names = ("bandwidth", "images", "images_per_second")
    results = {"stages": [dict(zip(names, stage, strict=True)) for stage in stages]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_speeds(str(tmp_path), "--throughput", float) == {96: 20.0, 224: 1.0}
    results["stages"][1]["images_per_second"] = 10.0
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_speeds(str(tmp_path), "--throughput", float)[96] == pytest.approx(300 / 20)
    results["stages"][2]["images_per_second"] = math.inf
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="must read like"):
        read_speeds(str(tmp_path), "--throughput", float)


@pytest.mark.parametrize(
    ("sentence", "flags"),
    [
        ("--throughput has no speed for bandwidths [96, 160]", ["--throughput={224: 3}"]),
        ("--throughput must be positive", ["--throughput={96: 1, 160: 0, 224: 3}"]),
        ("--throughput must be positive", ["--throughput={96: 1, 160: .inf, 224: 3}"]),
        ("--throughput must be positive", ["--throughput={96: {0: 1}, 160: 1, 224: 3}"]),
        ("--throughput must be positive", ["--throughput={96: {}, 160: 1, 224: 3}"]),
        ("--throughput must read like", ["--throughput={96: {64: {}}, 160: 1, 224: 3}"]),
        ("--loader must read like", [FLAT, "--loader={96: {64: 1}, 160: 1, 224: 3}"]),
        ("--throughput must read like", ["--throughput={96: fast}"]),
        ("--throughput must read like", ["--throughput=runs/none"]),
        ("--throughput must read like", [f"--throughput={'long' * 99}"]),
        ("--loader requires --throughput", ["--loader={96: 1}"]),
        ("--cores-per-gpu needs --loader", [FLAT, "--cores-per-gpu=2"]),
        ("--gpus must read like", [FLAT, "--gpus=many"]),
        ("--gpus must be positive", [FLAT, "--gpus=0"]),
    ],
)
def test_mistakes_are_reported_in_one_line(sentence, flags, capsys) -> None:
    assert main(["plan", "--images=1281167", "--curriculum.cost=area", *flags]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1


def test_worked_example_is_the_output_of_the_command(capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ mae-et (plan .*?)\n\.\.\.\n(.*?)\n```", page, re.S)
    assert main(shlex.split(block[1].replace("\\\n", " "))) == 0
    assert block[2] in capsys.readouterr().out
