"""Compare runs in one table: keys in which their configs differ, and their results."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mae_et.config.commands import CompareConfig
from mae_et.errors import UserError, listed
from mae_et.io.atomic import refuse_unwritable, write_text_atomically
from mae_et.io.plain_files import check_replaceable
from mae_et.monitoring.figures import ordered_figures
from mae_et.monitoring.run_figures import INNER, figures_of, settings_of
from mae_et.runtime.console import printable, say

# Figures of a fine-tuned run that are shown in the row of the run it started from.
ACCURACIES = ("top1", "top5", "best_top1", "raw_top1")


@dataclass(frozen=True)
class ComparedRun:
    """A row of the table."""

    name: str
    settings: dict[str, Any]
    """Config by flat keys."""
    figures: dict[str, Any]
    state: str = ""
    """State and last error of a run that is not finished."""


def compare(
    config: CompareConfig, width: int | None = None, unfinished: Mapping[Path, str] | None = None
) -> str:
    """Return a Markdown table with a row for each run, finished or not.

    Runs whose configs differ only in the seed also get a row of means and standard deviations.
    Fine-tuned classifiers share the row of the run they started from, if that is compared too.

    Args:
        config: runs and output file.
        width: characters of a line, beyond which the returned table has a column for each run.
        unfinished: state of the runs that are not finished, which have a row even without config.

    Raises:
        UserError: a run folder is missing or damaged, or the output cannot be written.
    """
    if config.output is not None:
        check_replaceable(config.output, r"\| run +\|", "output")
    runs = read_runs(config.runs, unfinished or {})
    varied = varied_keys([run.settings for run in runs if run.settings])
    runs += seed_means(runs)
    states = ["state"] * any(run.state for run in runs)
    figures = ordered_figures({key for run in runs for key in run.figures})
    rows = [
        [
            run.name,
            *([run.state] * len(states)),
            *(_cell(run.settings.get(key)) for key in varied),
            *(_cell(run.figures.get(key)) for key in figures),
        ]
        for run in runs
    ]
    head = ["run", *states, *varied, *figures]
    table = markdown_table(head, rows)
    if config.output is not None:
        with refuse_unwritable(f"output {config.output}"):
            write_text_atomically(config.output, table + "\n")
    if width is not None and table.index("\n") > width:
        head, *rows = [list(column) for column in zip(head, *rows, strict=True)]
        return markdown_table(head, rows)
    return table


def read_runs(folders: list[Path], unfinished: Mapping[Path, str]) -> list[ComparedRun]:
    """Read run folders, adding classifiers' accuracies to the run that they started from."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = {
        folder: _read_run(folder, name, unfinished.get(folder, ""))
        for folder, name in zip(folders, names_of(folders), strict=True)
    }
    others = [
        folder for folder, run in runs.items() if not (run.settings or run.figures or run.state)
    ]
    if len(others) == len(runs):
        raise UserError(f"{others[0]} holds no run")
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
    """Return a row of means for each group of runs that differ only in the seed."""
    settings = [{k: value for k, value in run.settings.items() if k != "seed"} for run in runs]
    groups: dict[int, list[ComparedRun]] = {}
    for run, shared in zip(runs, settings, strict=True):
        if run.settings:
            groups.setdefault(settings.index(shared), []).append(run)  # equal by value
    return [
        ComparedRun(
            f"mean of {len(group)} seeds: {group[0].name} ...", settings[first], _means(group)
        )
        for first, group in groups.items()
        if len({run.settings.get("seed") for run in group}) == len(group) > 1
    ]


def _means(group: list[ComparedRun]) -> dict[str, str]:
    means = {}
    for key in group[0].figures:
        found = [run.figures.get(key) for run in group]
        values = [float(value) for value in found if isinstance(value, (int, float))]
        if len(values) == len(group):
            means[key] = f"{mean(values):.5g} ± {stdev(values):.2g}"
    return means


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
    """Return the keys in which configs differ, sorted."""
    keys = sorted({key for each in settings for key in each})
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table that is also aligned as plain text, numbers to the right."""
    head, *rows = [
        [printable(" ".join(cell.split())).replace("|", "\\|") for cell in row]
        for row in [head, *rows]
    ]
    columns = list(zip(head, *rows, strict=True))
    right = [any(column[1:]) and all(map(_is_number, column[1:])) for column in columns]
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    lines = [
        "| " + " | ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(row, widths, right, strict=True)
        ) + " |"
        for row in (head, rule, *rows)
    ]  # fmt: skip
    return "\n".join(lines)


def _read_run(folder: Path, name: str, state: str) -> ComparedRun:
    settings = settings_of(folder)
    return ComparedRun(name, settings, figures_of(folder, settings), state)


def _parent(run: ComparedRun, folders: list[Path]) -> Path | None:
    """Return the folder among `folders` that holds the checkpoint a run started from."""
    checkpoint = run.settings.get("model.checkpoint")
    if not isinstance(checkpoint, str) or "\0" in checkpoint:
        return None
    path = Path(checkpoint).absolute()
    return next((each for each in folders if path.is_relative_to(each.absolute())), None)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell.partition(" ± ")[0] or 0)
    except ValueError:
        return False
    return True
