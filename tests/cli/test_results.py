"""Results of commands: a table on a terminal, one line of JSON elsewhere."""

import json
import sys
from pathlib import Path

import pytest
from mae_et.benchmarks.command import BENCHMARKS
from mae_et.benchmarks.step import StepConfig

import finetune
from mae_et.cli.main import main
from mae_et.monitoring.figures import probe_curve, results_table


@pytest.fixture
def command(tiny_yaml: Path, tmp_path: Path) -> list[str]:
    return ["pretrain", f"--config={tiny_yaml}", f"--output.dir={tmp_path / 'run'}"]


def test_a_finished_run_prints_a_short_table_on_a_terminal_and_json_elsewhere(
    command: list[str], tmp_path: Path, capsys, monkeypatch
) -> None:
    assert main(command) == 0
    piped = json.loads(capsys.readouterr().out)
    assert piped == {"run": str(tmp_path / "run")} | json.loads(
        (tmp_path / "run" / "results.json").read_text()
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == piped
    assert main(command) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) < 15
    assert max(map(len, lines[1:])) <= 80
    assert f"{piped['loss']:.5g}" in shown
    assert [line.split()[:2] for line in lines[-3:]] == [["1", "16"], ["2", "24"], ["3", "32"]]


def test_the_table_names_faults_only_if_there_were_any() -> None:
    results = {"loss": 0.5, "diverged": False, "skipped_updates": 0, "training_seconds": 3661.0}
    assert results_table(results).splitlines() == ["loss           0.5", "training time  1:01:01"]
    assert results_table({"format": "hf", "output": "out"}).splitlines() == [
        "format  hf", "output  out"
    ]  # fmt: skip
    written = results_table({"features": "f.npy", "images": 3, "shape": [3, 96]})
    assert written.splitlines() == ["features  f.npy", "shape     [3, 96]", "images    3"]
    prepared = {"train": {"images": 4000, "bytes": {"112": 2**20}}, "val": {"images": 3}}
    assert results_table(prepared).splitlines() == [
        "train images        4,000", "train bytes at 112  1,048,576", "val images          3",
    ]  # fmt: skip
    scored = {"dynamics": "out", "by": "knn", "checkpoints": 2, "last": {"8": 21.5}}
    assert results_table(scored).splitlines()[2:] == ["checkpoints  2", "last at 8    21.5"]
    found = {"search": "s", "objective": "knn", "bandwidths": [16, 32], "magnitudes": [0, 1],
             "value": 41.25, "trials": 4, "curriculum": "s/curriculum.yaml"}  # fmt: skip
    lines = [line.split(maxsplit=1) for line in results_table(found).splitlines()]
    assert lines == [[name, str(found[name])] for name in found if name != "magnitudes"]
    faulty = results_table(results | {"diverged": True, "skipped_updates": 1200})
    assert faulty.splitlines()[2:] == ["diverged         yes", "skipped updates  1,200"]


def test_the_table_ends_with_the_curve_of_the_probes() -> None:
    probes = [{"step": 9 * i, "compute": i / 20, "knn": 10.5 + i} for i in range(21)]
    last = results_table({"loss": 0.5, "probes": probes}).splitlines()[-1]
    assert last == (
        "kNN by compute: 10.5 at 0%, 15.5 at 25%, 20.5 at 50%, 25.5 at 75%, 30.5 at 100%"
    )
    ranks = [{"step": i, "compute": i / 1, "effective_rank": [8.0, None][i]} for i in (0, 1)]
    assert probe_curve(ranks) == "rank by compute: 8 at 0%, non-finite at 100%"


def test_bench_prints_its_table_on_a_terminal_and_only_json_elsewhere(capsys, monkeypatch) -> None:
    def measure(config: StepConfig) -> dict[str, int]:
        print("| step |")
        return {"batch": config.batch}

    monkeypatch.setitem(BENCHMARKS, "step", (StepConfig, measure))
    command = ["bench", "step", "--batch=3"]
    assert main(command) == 0
    piped = capsys.readouterr()
    assert json.loads(piped.out) == {"batch": 3}
    assert piped.err == "| step |\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([*command, "--json"]) == 0
    assert capsys.readouterr() == piped
    assert main(command) == 0
    assert capsys.readouterr().out == "| step |\n"


@pytest.mark.parametrize("command", ["knn", "linear-probe"])
def test_what_is_scored_is_printed_before_pytorch_is_loaded(
    command: str, tiny_yaml: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    shown = []
    monkeypatch.setattr(
        finetune, command.replace("-", "_"), lambda _: {"said": shown.append(capsys.readouterr())}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(tiny_yaml.read_text())
    assert main([command, str(tmp_path / "run")]) == 0
    assert shown[0].err == f"mae-et: scoring {tmp_path / 'run'} on synthetic\n"
