"""Show the status of runs as a table, once or repeatedly."""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from mae_et.monitoring.figures import (
    PERCENTAGES,
    figure_name,
    format_figure_of,
    format_seconds,
    images_of,
)
from mae_et.runtime.console import printable
from slurm.run_status import ENDED, RunStatus, status


def table(found: Iterable[RunStatus]) -> str:
    """Format statuses as a table for a terminal, followed by errors."""
    head = [
        "run", "job", "state", "step", "stage", "B", "loss", "score", "img/s", "ETA", "restarts",
        "lost",
    ]  # fmt: skip
    rows, errors = [head], []
    for each in found:
        rows.append([
            each.run,
            each.job or "-",
            each.state + (f" ({each.reason})" if each.reason else ""),
            f"{each.step}/{each.steps}" if each.steps else "-",
            each.stage or "-",
            _shown(each.bandwidth),
            _shown(each.loss, ".4f"),
            next((_score(key, each.scores) for key in each.scores), "-"),
            _shown(each.images_per_second, ".0f"),
            "-" if each.eta is None else format_seconds(each.eta),
            str(each.restarts),
            str(each.lost),
        ])  # fmt: skip
        if each.error:
            errors.append(printable(f"{each.run}: {each.error}"))
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *([""] if errors else []), *errors])


def _score(key: str, scores: dict[str, float]) -> str:
    """Return a score with its standard error and number of images, if that is recorded."""
    images = images_of(key, scores)
    counted = "" if images is None or key not in PERCENTAGES else f" (n = {images})"
    return f"{figure_name(key)} {format_figure_of(scores, key)}{counted}"


def _shown(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def watch(folders: Sequence[Path], seconds: float) -> None:
    """Print the table every `seconds`, until every run has ended."""
    while True:
        found = status(folders)
        clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
        print(f"{clear}{time.strftime('%H:%M:%S')}\n{table(found)}", flush=True)
        if all(each.state in ENDED for each in found):
            return
        time.sleep(seconds)
