"""A run begun before the keys were renamed resumes, once its keys are renamed as the table says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import GOLDEN

from mae_et import PretrainConfig, pretrain
from mae_et.checkpoints.store import save_checkpoint
from mae_et.config.files import config_from_text, to_yaml
from mae_et.config.suggestions import keys_of, suggest_key
from mae_et.io.metrics_file import read_metrics

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
BEFORE = GOLDEN / "run_before_renaming"


def renamed(kind: str) -> dict[str, str]:
    """Return old and new names from the tables of a kind: before the first release, and since."""
    text = "".join(path.read_text(encoding="utf-8") for path in (BEFORE / "README.md", CHANGELOG))
    tables = re.findall(rf"\| old {kind} \| new {kind} \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text)
    assert tables
    names = {}
    for row in "".join(tables).splitlines():
        old, new = (re.findall(r"`([\w.]+)`", cell) for cell in row.strip("|").split("|"))
        names.update(zip(old, new, strict=False))
    return names


def rename_keys(config: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Rename the keys of a nested config; names are dotted."""
    for old, new in names.items():
        section, key = old.split(".")
        if key in config[section]:
            config[section][new.split(".")[1]] = config[section].pop(key)
    return config


def windows(rows: list[dict], ends: list[int]) -> list[list]:
    """Return the steps and losses of rows, averaged into windows: a row ends at a checkpoint."""
    found, losses = [], []
    for row in rows:
        losses += [row["loss"]] * row["window_steps"]
        if row["step"] in ends:
            found.append([row["step"], sum(losses) / len(losses)])
            losses = []
    return found


def test_old_key_is_answered_with_the_new_one() -> None:
    known = list(keys_of(PretrainConfig))
    for old, new in renamed("config key").items():
        assert suggest_key(old, known).startswith(f"; did you mean {new}")


def test_run_started_before_the_renaming_resumes_with_the_same_losses(tmp_path: Path) -> None:
    saved = torch.load(BEFORE / "step-00000010.pt", weights_only=True)
    old = yaml.safe_load(saved["config"])
    new = rename_keys(old, renamed("config key"))
    new["output"]["dir"] = str(tmp_path / "run")
    config = config_from_text(yaml.safe_dump(new), PretrainConfig)
    names = renamed("checkpoint entry")
    about = {"format", "config", "plan", "origin"}
    state = {names.get(name, name): saved[name] for name in saved.keys() - about}
    folder = tmp_path / "run" / "checkpoints"
    save_checkpoint(folder, state, to_yaml(config), saved["plan"], saved["origin"])
    pretrain(config)
    expected = json.loads((BEFORE / "losses.json").read_text())["losses"]
    found = windows(read_metrics(tmp_path / "run"), [step for step, _ in expected])
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
