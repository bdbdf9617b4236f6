"""What a run folder keeps about how it was computed: log.txt, environment.jsonl."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch

import mae_et
from mae_et.monitoring.log_file import log_file
from mae_et.runtime.console import say


def test_every_start_has_a_row_and_the_log_has_what_stderr_had(tiny, capfd) -> None:
    config = tiny("--efficiency.micro_batch=6", "--output.log_every=1")
    folder = config.output.dir
    say("said before")
    mae_et.pretrain(config, stop_after_step=1)
    (folder / "log.txt").write_text("kept\n" + (folder / "log.txt").read_text())
    mae_et.pretrain(config)
    first, second = map(json.loads, (folder / "environment.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 1)
    assert json.loads((folder / "results.json").read_text())["provenance"] == second | {
        "time": pytest.approx(second["time"], abs=600),
        "step": 25,
    }
    facts = {
        "python": platform.python_version(), "torch": version("torch"), "timm": timm.__version__,
        "mae-et": mae_et.__version__, "cuda": torch.version.cuda, "device": "cpu", "ranks": 1,
        "precision": "float32", "micro_batch": {"16": 12, "24": 6, "32": 6}, "compiled": False,
        "cuda_graphs": False, "decode": "cpu", "slurm_job": None,
    }  # fmt: skip
    assert {name: second[name] for name in facts} == facts
    clone = Path(mae_et.__file__).parents[1]
    head = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = head.stdout.strip() if (clone / ".git").exists() and head.returncode == 0 else None
    assert (second["commit"] or "").rstrip("+") == (expected or "")

    kept, *lines = (folder / "log.txt").read_text().splitlines()
    assert kept == "kept"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    logged = [line[20:] for line in lines if line[20] != "$"]
    said = capfd.readouterr().err.splitlines()
    assert logged[logged.index("mae-et: said before") :] == said[: len(said)]
    assert any(line.startswith("passes") for line in said)


def test_the_error_that_ends_a_run_is_in_its_log(tiny, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise mae_et.RunFailed("the loss is NaN")

    monkeypatch.setattr("mae_et.training.session.train", fails)
    config = tiny()
    with pytest.raises(mae_et.RunFailed):
        mae_et.pretrain(config)
    log = config.output.dir / "log.txt"
    assert log.read_text().splitlines()[-1].endswith("RunFailed: the loss is NaN")
    say("after the run")
    assert "after the run" not in log.read_text()


def test_a_full_disk_under_the_log_does_not_end_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(path: Path, flags: int) -> int:
        return os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr("mae_et.monitoring.log_file.no_follow", full)
    with log_file(tmp_path):
        say("continues")
    assert "continues" in capsys.readouterr().err
