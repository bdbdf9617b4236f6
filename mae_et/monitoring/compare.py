"""Compare runs in one table: keys in which their configs differ, and their results."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mae_et.config.commands import CompareConfig, TableFormat
from mae_et.config.suggestions import suggest
from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable, write_text_atomically
from mae_et.io.metrics_file import is_plausible
from mae_et.io.plain_files import check_replaceable
from mae_et.monitoring.compared_runs import ComparedRun, Mean, read_runs, seed_means, varied_keys
from mae_et.monitoring.figures import (
    PERCENTAGES,
    figure_name,
    format_seconds,
    is_error,
    ordered_figures,
)
from mae_et.monitoring.tables import csv_table, latex_table, markdown_table

NOTE = "Rows of means: mean ± standard deviation over n seeds (of the sample, n - 1)."
START = r"\| run +\||run,|\\begin\{tabular\}"
# Figures that are shown by default of a run itself, not of the classifiers inside its folder.
OWN = ("loss", "val_loss", "equivalent_epochs", "images", "val_images", "training_seconds")
# Scores of a sample of images; omitted if all runs have the scores of all images.
SAMPLED = {"probe_knn": "knn", "probe_ridge": "linear", "probe_val_images": "knn"}


def compare(
    config: CompareConfig, width: int | None = None, unfinished: Mapping[Path, str] | None = None
) -> str:
    """Return a table with a row for each run, finished or not, or the same as a line of JSON.

    Runs whose configs differ only in the seed also get a row of means and standard deviations, but
    not in CSV and JSON, whose numbers are not rounded. Fine-tuned classifiers share the row of the
    run they started from, if that is compared too.

    Args:
        config: runs, columns, format and output file.
        width: characters of a line, beyond which a Markdown table is returned with a column for
            each run.
        unfinished: state of the runs that are not finished, which have a row even without config.
    """
    if config.output is not None:
        check_replaceable(config.output, START, "output")
    runs = read_runs(config.runs, unfinished or {})
    keys = _columns(config.columns, runs)
    is_csv = config.format == "csv"
    means = [] if is_csv else seed_means(runs)
    states = ["state"] * any(run.state for run in runs)
    figures = {key for run in runs for key in run.figures}
    head = ["run", *states, *(_header(key, is_csv) if key in figures else key for key in keys)]
    rows = [
        [run.name, *([run.state] * len(states)), *(_cell(run, key, is_csv) for key in keys)]
        for run in (*runs, *means)
    ]
    table = _written(config.format, head, rows, bool(means))
    if config.output is not None:
        with refuse_unwritable(f"output {config.output}"):
            write_text_atomically(config.output, table + "\n")
    if config.json:
        return json.dumps(
            [
                {"run": run.name, **dict.fromkeys(states, run.state)}
                | {key: _value(run, key) for key in keys}
                for run in runs
            ]
        )
    if config.format == "md" and width is not None and table.index("\n") > width:
        head, *rows = [list(column) for column in zip(head, *rows, strict=True)]
        return _written("md", head, rows, bool(means))
    return table


def _written(
    form: TableFormat, head: Sequence[str], rows: Sequence[Sequence[str]], has_means: bool
) -> str:
    if form == "csv":
        return csv_table(head, rows)
    if form == "latex":
        return latex_table(head, rows) + f"\n% {NOTE}" * has_means
    return markdown_table(head, rows) + f"\n\n{NOTE}" * has_means


def _columns(given: str | None, runs: Sequence[ComparedRun]) -> list[str]:
    """Return the keys of the columns: those given, or config differences and the main figures."""
    figures = ordered_figures({key for run in runs for key in run.figures})
    if given is None:
        varied = varied_keys([run.settings for run in runs if run.settings])
        return [*varied, *(key for key in figures if _is_main(key, runs))]
    settings = sorted({key for run in runs for key in run.settings})
    chosen: list[str] = []
    for word in given.split(","):
        name = word.strip().lower()
        found = [key for key in settings if fnmatchcase(key.lower(), name)]
        found += [
            key
            for key in figures
            if any(fnmatchcase(each.lower(), name) for each in (key, figure_name(key)))
        ]
        if not found:
            meant = suggest(name, [*figures, *settings]) or f"; figures: {', '.join(figures)}"
            raise UserError(f"columns: no run has {word.strip()!r}{meant}")
        chosen += [key for key in found if key not in chosen]
    return chosen


def _is_main(key: str, runs: Sequence[ComparedRun]) -> bool:
    """Return whether a figure is shown by default."""
    *inner, name = key.split(" ")
    if is_error(name) or (inner and name in OWN):
        return False
    better = SAMPLED.get(name)
    return better is None or any(key in run.figures and better not in run.figures for run in runs)


def _header(key: str, raw: bool) -> str:
    """Return the name of a figure with the unit of its cells."""
    unit = ""
    if key.endswith("seconds"):
        unit = " (s)" if raw else " (h:mm:ss)"
    return figure_name(key) + (" (%)" if key.endswith(PERCENTAGES) else unit)


def _value(run: ComparedRun, key: str) -> Any:
    return run.figures.get(key, run.settings.get(key))


def _cell(run: ComparedRun, key: str, raw: bool) -> str:
    value = _value(run, key)
    if value is None:
        return ""
    if raw:
        return str(value)
    if key not in run.figures:
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, Mean):
        return f"{_rounded(key, value.mean)} ± {_rounded(key, value.deviation, digits=2)}"
    return _rounded(key, value)


def _rounded(key: str, value: Any, digits: int = 4) -> str:
    """Format a figure without its unit, with so many digits if they depend on its size."""
    if isinstance(value, bool) or not is_plausible(value):
        return str(value)
    if key.endswith("seconds"):
        return format_seconds(value)
    if key.endswith(PERCENTAGES):
        return f"{value:.2f}"
    return f"{value:,.0f}" if key.endswith("images") else f"{value:.{digits}g}"
