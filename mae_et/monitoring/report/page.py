"""The page: what stands where; the template beside it says how it looks."""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically
from mae_et.monitoring.compare import ordered_figures, varied_keys
from mae_et.monitoring.progress import format_seconds
from mae_et.monitoring.report.charts import COLOURS, short
from mae_et.monitoring.report.curves import Group, groups_of
from mae_et.monitoring.report.images import pictures
from mae_et.monitoring.report.records import Record, number, read_records
from mae_et.monitoring.report.stages import stages, staircase
from mae_et.version import __version__

PLAIN = {"top1": "top-1", "top5": "top-5", "best_top1": "best top-1",
         "raw_top1": "raw top-1", "raw_top5": "raw top-5",
         "knn": "kNN", "untrained_knn": "kNN, untrained", "untrained_linear": "linear, untrained",
         "equivalent_epochs": "equivalent epochs", "training_seconds": "training time"}  # fmt: skip
PERCENT = ("top1", "top5", "knn", "linear")
# What a run is, in one line of facts: names, and the keys whose values stand behind them.
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


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    record: Record
    number: int
    """Its place among the runs, from 1."""
    colour: int
    state: str
    tiles: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    steps: list[dict[str, Any]]
    """The curriculum, a step of the staircase for each bandwidth in turn."""
    stages: list[dict[str, Any]]
    figures: list[tuple[str, str]]
    pictures: list[tuple[str, str]]
    panels: str


def report(runs: list[Path], output: Path) -> Path:
    """Write an HTML file about runs.

    Raises:
        UserError: a folder holds no run, a file in it is damaged, or the output cannot be written.
    """
    if output.is_dir():
        raise UserError(f"--output {output} is a folder")
    records = read_records(runs)
    colours = {record.name: place % COLOURS for place, record in enumerate(records)}
    sections = [
        _section(record, place, colours[record.name]) for place, record in enumerate(records, 1)
    ]
    html = render(sections, groups_of(records, colours))
    try:
        # Names of files need not be text.
        write_atomically(output, lambda path: path.write_bytes(html.encode("utf-8", "replace")))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    return output


def render(sections: list[Section], groups: list[Group]) -> str:
    """Return the page; all texts are escaped, whoever wrote them."""
    names = [section.record.name for section in sections]
    return _template().render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        sections=sections,
        groups=groups,
        tables=_tables(sections, groups),
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


def _section(record: Record, place: int, colour: int) -> Section:
    facts = [(name, _fact(record, keys)) for name, keys in FACTS.items()]
    hog = record.settings.get("model.target") == "hog"
    last = "true HOG, predicted HOG" if hog else "reconstruction, pasted"
    return Section(
        record,
        place,
        colour,
        _state(record),
        _tiles(record),
        [(name, fact) for name, fact in facts if fact],
        [] if record.plan is None else staircase(record.plan, record.step),
        [] if record.plan is None else stages(record, record.plan),
        [(plain_name(key), shown(key, value)) for key, value in _scalars(record)],
        pictures(record),
        f"Four panels a row: input, masked input, {last}.",
    )


def _fact(record: Record, keys: tuple[str, ...]) -> str:
    found = [record.settings[key] for key in keys if key in record.settings]
    nothing = "synthetic" if found and "data.name" in keys else ""
    return next((str(value) for value in found if value is not None), nothing)


def _state(record: Record) -> str:
    if record.finished:
        return "finished"
    if not record.rows:
        return "no step yet"
    when = number(record.rows[-1], "time")
    seen = "" if when is None else time.strftime(", last seen %Y-%m-%d %H:%M", _local(when))
    return f"not finished: {record.share:.0%} of the compute done{seen}"


def _local(seconds: float) -> time.struct_time:
    try:
        return time.localtime(seconds)
    except (OverflowError, OSError, ValueError):
        return time.localtime(0)


def _tiles(record: Record) -> list[tuple[str, str]]:
    found = record.reached
    first = ("top1", "best_top1", "top5", "loss", "knn", "linear")
    keys: list[str] = [key for key in first if key in found]
    keys += [k for k in found if k.endswith((" top1", " top5"))][:2]
    tiles = [(plain_name(key), shown(key, found[key])) for key in keys]
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


def _scalars(record: Record) -> list[tuple[str, Any]]:
    """Return all final figures that are one number or word, with those of inner runs."""
    flat = record.results | {k: v for k, v in record.figures.items() if k not in record.results}
    return [(k, v) for k, v in flat.items() if isinstance(v, (int, float, str))]


def plain_name(key: str) -> str:
    """Return what people call a figure: `finetune best_top1` is `finetune best top-1`."""
    *inner, name = key.split(" ")
    return " ".join([*inner, PLAIN.get(name, name.replace("_", " "))])


def shown(key: str, value: Any) -> str:
    """Write a figure with its unit."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    finite = number({key: value}, key)
    if finite is None:
        return str(value)
    if key.endswith("seconds"):
        return format_seconds(finite)
    if key.endswith(PERCENT):
        return f"{finite:.4g} %"
    if isinstance(value, int):
        return f"{value:,}"
    return short(finite) if abs(finite) >= 1e6 else f"{finite:.5g}"


def _tables(sections: list[Section], groups: list[Group]) -> list[dict[str, Any]]:
    """Return a table for each group of runs, if there are several runs."""
    if len(sections) < 2:
        return []
    tables = []
    for group in groups:
        names = {name for name, _ in group.names}
        mine = [section for section in sections if section.record.name in names]
        tables.append({"title": group.title} | _comparison(mine))
    return tables


def _comparison(sections: list[Section]) -> dict[str, Any]:
    """Return the table of several runs: where their configs differ, and what they reached."""
    varied = varied_keys([section.record.settings for section in sections])
    reached = [section.record.reached for section in sections]
    figures = ordered_figures({key for found in reached for key in found})
    rows = []
    for section, found in zip(sections, reached, strict=True):
        settings = section.record.settings
        cells = ["" if settings.get(key) is None else str(settings[key]) for key in varied]
        rows.append((section, cells, [shown(key, found.get(key)) for key in figures]))
    return {"varied": varied, "figures": [plain_name(key) for key in figures], "rows": rows}
