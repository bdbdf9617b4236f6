"""Render the page from `page.html` and `page.css`."""

import time
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable, write_atomically
from mae_et.io.plain_files import check_replaceable
from mae_et.monitoring.compared_runs import varied_keys
from mae_et.monitoring.figures import (
    figure_name,
    format_figure_of,
    format_seconds,
    is_error,
    ordered_figures,
    short,
)
from mae_et.monitoring.report.charts import FRAME
from mae_et.monitoring.report.curves import Group, groups_of
from mae_et.monitoring.report.images import embedded_images
from mae_et.monitoring.report.records import ReportedRun, read_runs
from mae_et.monitoring.report.stages import stages, staircase
from mae_et.version import __version__

# Facts in the header of a run: names, and the config keys that hold their values.
FACTS = {
    "encoder": ("model.encoder", "model.backbone", "model.checkpoint"),
    "image size": ("model.image_size",),
    "patch": ("model.patch_size",),
    "target": ("model.target",),
    "mask ratio": ("model.mask_ratio",),
    "crop": ("crop.method",),
    "curriculum": ("curriculum.preset",),
    "batch": ("optim.batch_size",),
    "base rate": ("optim.base_lr",),
    "data": ("data.root", "data.name"),
    "precision": ("efficiency.precision",),
    "seed": ("seed",),
}


def report(runs: list[Path], output: Path) -> Path:
    """Write an HTML file about runs.

    Raises:
        UserError: a folder holds no run, a file in it is damaged, or the output cannot be written.
    """
    if output.is_dir():
        raise UserError(f"--output {output} is a folder")
    check_replaceable(output, r"\s*<!doctype html>.*mae-et</title>", "output")
    html = render(read_runs(runs))
    with refuse_unwritable(f"--output {output}"):
        # File names may contain bytes that are not UTF-8.
        write_atomically(output, lambda path: path.write_bytes(html.encode("utf-8", "replace")))
    return output


def render(records: list[ReportedRun]) -> str:
    """Return the page; all text is escaped."""
    groups = groups_of(records)
    return _template().render(
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        frame=FRAME,
        sections=[_section(record) for record in records],
        groups=groups,
        tables=[_comparison(group) for group in groups] if len(records) > 1 else [],
        state=_state,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _section(record: ReportedRun) -> dict[str, Any]:
    """Return what the page shows of one run."""
    facts = ((name, _fact(record, keys)) for name, keys in FACTS.items())
    return {
        "record": record,
        "tiles": _tiles(record),
        "facts": [(name, fact) for name, fact in facts if fact],
        "stairs": [] if record.plan is None else staircase(record.plan, record.step),
        "stages": [] if record.plan is None else stages(record, record.plan),
        "augments": record.settings.get("data.augment") is not None,
        "figures": _scalars(record),
        "images": embedded_images(record),
    }


def _fact(record: ReportedRun, keys: tuple[str, ...]) -> str:
    found = [record.settings[key] for key in keys if key in record.settings]
    nothing = "synthetic" if found and "data.name" in keys else ""
    return next((str(value) for value in found if value is not None), nothing)


def _state(record: ReportedRun) -> str:
    if record.finished:
        return "finished"
    if not record.rows:
        return "no step yet"
    when = record.rows[-1].get("time")
    seen = "" if when is None else time.strftime(", last seen %Y-%m-%d %H:%M", _local(when))
    return f"not finished: {record.share:.0%} of the compute done{seen}"


def _local(seconds: float) -> time.struct_time:
    try:
        return time.localtime(seconds)
    except (OverflowError, OSError, ValueError):
        return time.localtime(0)


def _tiles(record: ReportedRun) -> list[tuple[str, str]]:
    found = record.figures
    first = ("top1", "best_top1", "top5", "loss", "val_loss", "knn", "linear", "probe_knn")
    keys: list[str] = [key for key in first if key in found]
    keys += [k for k in found if k.endswith((" top1", " top5"))][:2]
    tiles = [(figure_name(key), format_figure_of(found, key)) for key in keys]
    step = record.step
    for name, value, unit in (
        ("equivalent epochs", record.epochs(step), ""),
        ("compute", record.compute(step), record.unit),
        ("images", record.images(step), ""),
    ):
        if value is not None:
            tiles.append((name, short(value, unit)))
    seconds = record.seconds(step)
    if seconds is not None:
        tiles.append(("training time", format_seconds(seconds)))
    return [(name, text) for name, text in tiles if text]


def _scalars(record: ReportedRun) -> list[tuple[str, str]]:
    """Return all final figures that are numbers or strings, including those of inner runs."""
    flat = record.results | {k: v for k, v in record.figures.items() if k not in record.results}
    shown = [key for key, value in flat.items() if isinstance(value, (int, float, str))]
    return [(figure_name(k), format_figure_of(flat, k)) for k in shown if not is_error(k)]


def _comparison(group: Group) -> dict[str, Any]:
    """Return the keys in which the configs of runs differ, and the figures of the runs."""
    varied = varied_keys([record.settings for record in group.records])
    found = {key for record in group.records for key in record.figures if not is_error(key)}
    figures = ordered_figures(found)
    rows = []
    for record in group.records:
        cells = ["" if (v := record.settings.get(key)) is None else str(v) for key in varied]
        reached = record.figures
        rows.append((record, cells, [format_figure_of(reached, key) for key in figures]))
    names = [figure_name(key) for key in figures]
    return {"title": group.title, "varied": varied, "figures": names, "rows": rows}
