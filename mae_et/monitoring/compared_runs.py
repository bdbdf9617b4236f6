"""Read the runs to compare: their configs and figures, and means over seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mae_et.errors import UserError, listed
from mae_et.io.metrics_file import is_plausible
from mae_et.monitoring.run_record import INNER, RunRecord
from mae_et.runtime.console import say

ACCURACIES = ("top1", "top5", "best_top1", "raw_top1")
"""Figures of a fine-tuned run that are shown in the row of the run it started from."""


@dataclass(frozen=True)
class ComparedRun:
    """A row of the table."""

    name: str
    settings: dict[str, Any]
    """Config by flat keys."""
    figures: dict[str, Any]
    state: str = ""
    """State and last error of a run that is not finished."""


@dataclass(frozen=True)
class Mean:
    """The figures of several seeds."""

    mean: float
    deviation: float
    """Standard deviation of the sample."""


def read_runs(folders: list[Path], unfinished: Mapping[Path, str]) -> list[ComparedRun]:
    """Read run folders, adding classifiers' accuracies to the run that they started from."""
    check_existence(folders)
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = {}
    for folder, name in zip(folders, names_of(folders), strict=True):
        record = RunRecord(folder)
        runs[folder] = ComparedRun(
            name, record.settings, dict(record.figures), unfinished.get(folder, "")
        )
    others = [
        folder for folder, run in runs.items() if not (run.settings or run.figures or run.state)
    ]
    if len(others) == len(runs):
        raise no_run(others[0])
    if others:
        say(f"not compared, as they hold no run: {listed(others)}")
    runs = {folder: run for folder, run in runs.items() if folder not in others}
    for folder, run in list(runs.items()):
        parent = _parent(run, [other for other in runs if other != folder])
        if parent is None:
            continue
        if folder.absolute().parent == parent.absolute():
            del runs[folder]  # its figures are already in its parent's row
            continue
        probe = run.settings.get("model.probe", "none")
        kind = "finetune" if probe == "none" else f"finetune-{probe}"
        found = {f"{kind} {key}": run.figures[key] for key in ACCURACIES if key in run.figures}
        if not found.keys() & runs[parent].figures.keys():  # otherwise it keeps its own row
            runs[parent].figures.update(found)
            del runs[folder]
    return list(runs.values())


def seed_means(runs: list[ComparedRun]) -> list[ComparedRun]:
    """Return a row of means for each group of finished runs that differ only in the seed."""
    settings = [{k: value for k, value in run.settings.items() if k != "seed"} for run in runs]
    groups: dict[int, list[ComparedRun]] = {}
    for run, shared in zip(runs, settings, strict=True):
        if run.settings and not run.state:
            groups.setdefault(settings.index(shared), []).append(run)  # equal by value
    return [
        ComparedRun(
            f"mean of {len(group)} seeds: {group[0].name} ...", settings[first], _means(group)
        )
        for first, group in groups.items()
        if len({run.settings.get("seed") for run in group}) == len(group) > 1
    ]


def _means(group: list[ComparedRun]) -> dict[str, Any]:
    """Return the figures that the whole group has, those in which they agree as they are."""
    means: dict[str, Any] = {}
    for key, first in group[0].figures.items():
        found = [run.figures.get(key) for run in group]
        values = [float(value) for value in found if is_plausible(value)]  # type: ignore[arg-type]
        if len(values) == len(group):
            means[key] = Mean(mean(values), stdev(values)) if len(set(values)) > 1 else first
    return means


def check_existence(folders: list[Path]) -> None:
    """Refuse a missing folder."""
    for missing in (folder for folder in folders if not folder.exists()):
        raise UserError(f"there is no run folder {missing}")


def no_run(folder: Path) -> UserError:
    """Return the refusal of a folder without a run, which may hold the folders of runs."""
    below = any(folder.glob("*/config.yaml"))
    return UserError(f"{folder} holds no run" + (f"; its folders do: {folder}/*" if below else ""))


def names_of(folders: list[Path]) -> list[str]:
    """Name runs by the shortest unique suffixes of their paths."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for mine in parts:
        length = 2 if mine[-1:] and mine[-1] in INNER else 1  # finetune alone is not a name
        while length < len(mine) and sum(p[-length:] == mine[-length:] for p in parts) > 1:
            length += 1
        names.append("/".join(mine[-length:]))
    return names


def varied_keys(settings: list[dict[str, Any]]) -> list[str]:
    """Return the keys in which the configs that have them differ, sorted."""
    found: dict[str, list[Any]] = {}
    for each in settings:
        for key, value in each.items():
            found.setdefault(key, []).append(value)
    return [key for key, values in sorted(found.items()) if any(v != values[0] for v in values)]


def _parent(run: ComparedRun, folders: list[Path]) -> Path | None:
    """Return the folder among `folders` that holds the checkpoint a run started from."""
    checkpoint = run.settings.get("model.checkpoint")
    if not isinstance(checkpoint, str) or "\0" in checkpoint:
        return None
    path = Path(checkpoint).absolute()
    return next((each for each in folders if path.is_relative_to(each.absolute())), None)
