"""Names with control characters reach no terminal unescaped: classes, files, keys, runs, splits."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import finetune
import mae_et
import slurm
from mae_et.checkpoints.state_dicts import find_state_dict
from mae_et.checkpoints.writers.model_card import model_card
from mae_et.cli.main import main
from mae_et.monitoring.tables import csv_cell
from mae_et.runtime.console import printable
from slurm.events import record_event

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\nmae-et: all is well\u202e\x9b31m"


def test_printable_escapes_control_characters_only() -> None:
    assert printable("é 日本 – run/1") == "é 日本 – run/1"
    assert printable("a\x1b[2J\n\r\t\x7f\x9b") == r"a\x1b[2J\n\r\t\x7f\x9b"
    assert printable("\u202eb\u2028\udcff") == r"\u202eb\u2028\udcff"
    assert all(each.isprintable() for each in printable(HOSTILE))


def run_with_a_hostile_class(place: Path) -> list[str]:
    for name in ("a", "b"):
        (place / "data/train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "data/train" / name / "1.png")
    (place / "data/val" / HOSTILE).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "data/val" / HOSTILE / "1.png")
    return ["supervised", "--model.backbone=resnet10t", "--data.root=data", "--optim.batch_size=2"]


def run_with_a_hostile_image(place: Path) -> list[str]:
    (place / "data/train/a").mkdir(parents=True)
    (place / "data/train/a" / f"{HOSTILE}.png").write_bytes(b"no image")
    return ["pretrain", "--config=tiny.yaml", "--data.root=data", "--optim.batch_size=1"]


def run_with_a_hostile_split(place: Path) -> list[str]:
    (place / "data").mkdir()
    return ["pretrain", "--config=tiny.yaml", "--data.root=data", f"--data.train_split={HOSTILE}"]


def run_in_a_hostile_folder(place: Path) -> list[str]:
    (place / HOSTILE).write_text("")
    return ["pretrain", "--config=tiny.yaml", f"--output.dir={HOSTILE}"]


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "command": lambda place: [HOSTILE],
    "flag": lambda place: ["pretrain", f"--{HOSTILE}=1"],
    "value": lambda place: ["pretrain", f"--model.encoder={HOSTILE}"],
    "config": lambda place: ["pretrain", f"--config={HOSTILE}"],
    "split": run_with_a_hostile_split,
    "checkpoint": lambda place: ["knn", f"--checkpoint={HOSTILE}"],
    "status": lambda place: ["status", HOSTILE],
    "compare": lambda place: ["compare", HOSTILE],
    "report": lambda place: ["report", HOSTILE],
    "cluster": lambda place: ["submit", "pretrain", f"--cluster={HOSTILE}"],
    "class": run_with_a_hostile_class,
    "image": run_with_a_hostile_image,
    "folder": run_in_a_hostile_folder,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_name_is_escaped_in_the_error(place: Path, capsys, name: str) -> None:
    assert main(COMMANDS[name](place)) in {1, 2}
    err = capsys.readouterr().err
    assert all(line.isprintable() for line in err.split("\n"))
    assert not [line for line in err.split("\n") if line.startswith("mae-et: all is well")]
    assert r"\x1b" in err  # shown, not dropped


def test_hostile_run_name_is_escaped_in_tables_and_warnings(place: Path, capsys) -> None:
    run = place / HOSTILE
    record_event(run, "failed", sentence=f"it broke: {HOSTILE}")
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    (run / "config.yaml").write_text((place / "tiny.yaml").read_text())
    for command in ("status", "compare"):
        assert main([command, os.fspath(run)]) == 0
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in (out + err).split("\n"))
        assert r"\x1b" in out


def test_hostile_entry_of_a_checkpoint_is_escaped(tmp_path: Path, capsys) -> None:
    weights = {"patch_embed.proj.weight": torch.zeros(4, 3, 8, 8)}
    found = {f"ema.{HOSTILE}": weights, "model": weights}
    find_state_dict(tmp_path / HOSTILE, found, weights.keys())
    err = capsys.readouterr().err
    assert r"taking the moving average ema.a\x1b" in err
    assert all(line.isprintable() for line in err.split("\n"))


def test_every_line_on_stderr_is_escaped() -> None:
    """`say` escapes them; the other two print nothing that others named."""
    folders = [Path(package.__file__).parent for package in (mae_et, finetune, slurm)]
    sources = {path: path.read_text() for folder in folders for path in folder.rglob("*.py")}
    writers = {path.name for path, text in sources.items() if "file=sys.stderr" in text}
    assert writers == {"console.py", "watchdog.py", "__main__.py"}
    twice = [path.name for path, text in sources.items() if re.search(r'say\(\s*f?"mae-et:', text)]
    assert not twice  # `say` puts the program's name before each line


def test_model_card_escapes_the_names_of_runs_and_data() -> None:
    weights: Any = SimpleNamespace(path=Path(HOSTILE), config=None)
    about = {"architectures": ["ViTModel"], "hidden_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "patch_size": 8, "image_size": 8}  # fmt: skip
    card = model_card(weights, about)
    assert "# a\\x1b]0;owned" in card
    assert all(line.isprintable() for line in card.split("\n"))


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_class_name_that_a_spreadsheet_would_run_is_quoted_in_csv(name: str) -> None:
    assert csv_cell(name).startswith("'")
    assert csv_cell("tench, Tinca") == "tench, Tinca"
    assert csv_cell(f"a{HOSTILE}").isprintable()
