"""Read the config and the figures of a run, with those of the scores inside its folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mae_et.config.files import flat_keys
from mae_et.config.plain_yaml import parse_yaml
from mae_et.curriculum.plan import read_plan
from mae_et.errors import UserError
from mae_et.io.metrics_file import (
    METRICS,
    SCORES,
    Row,
    is_plausible,
    read_metrics,
    with_current_names,
)
from mae_et.io.plain_files import read_mapping, read_text
from mae_et.io.score_records import RESULTS, Record, deciding, read_records
from mae_et.monitoring.figures import FIGURES
from mae_et.monitoring.probes import MEASURES

PROBES = ("probes", "knn", "linear-probe")
"""Folders inside a run folder with scores of its encoder."""
INNER = (*PROBES, "finetune", "finetune-linear", "finetune-attentive", "evaluate")
"""Usual folders inside it with results that started from the run."""


def settings_of(folder: Path) -> dict[str, Any]:
    """Return a run's config by flat keys (`optim.base_lr`), without `output`."""
    if not folder.exists():
        raise UserError(f"there is no run folder {folder}")
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    text = read_text(path)
    try:
        flat = flat_keys(parse_yaml(text))
        return {key: value for key, value in flat.items() if not key.startswith("output.")}
    except (AttributeError, RecursionError, TypeError, ValueError, yaml.YAMLError):
        raise UserError(f"{path} is damaged") from None


def figures_of(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run, and of the scores and the classifiers in folders inside it.

    Those of an unfinished run are of its last rows of metrics and scores.

    Names of figures on other data or with other settings include these: `cifar10 pool=cls knn`. If
    such a name stands for several scores, it is the latest; names of the earlier ones include in
    what they differ from it.
    """
    found = _figures(results_of(folder) or _figures_so_far(folder, settings), "")
    own = settings.get("data.root") or settings.get("data.name") or "synthetic"
    for inner in _inner_folders(folder):
        records = read_records(inner)
        kind = "" if inner.name in PROBES else f"{inner.name} "
        if not kind or "top1" in records[0]:
            for name, record in _named(records, str(own)):
                found |= _figures(record, name + kind)
    return found


def _inner_folders(folder: Path) -> list[Path]:
    """Return the folders with results inside a run folder; those of its encoder's scores first."""
    others = sorted(path.name for path in folder.glob("*") if path.name not in PROBES)
    names = [name for name in (*PROBES, *others) if (folder / name / RESULTS).is_file()]
    return [folder / name for name in names]


def _named(records: list[Record], own: str) -> Iterator[tuple[str, Record]]:
    """Yield each record, from the latest on, with its data and settings as the start of a name."""
    named: dict[str, Record] = {}
    for record in records:
        data = str(record.get("data", own))
        name = "" if Path(data).absolute() == Path(own).absolute() else f"{Path(data).name} "
        name += f"{record['settings']} " if "settings" in record else ""
        if name in named:
            latest = deciding(named[name])
            entries = deciding(record).items()
            changed = [f"{key}={value}" for key, value in entries if value != latest.get(key)]
            name += ",".join(changed).replace(" ", "") + " " * bool(changed)
        while name in named:
            name += "earlier "
        named[name] = record
        yield name, record


def results_of(folder: Path) -> dict[str, Any]:
    """Return the results of a run; empty if there are none."""
    path = folder / RESULTS
    return with_current_names(read_mapping(path)) if path.exists() else {}


def rows_of(folder: Path, name: str = METRICS) -> list[Row]:
    """Return the rows of a record in the order of their steps, without damaged values."""
    rows = ({k: v for k, v in row.items() if is_plausible(v)} for row in read_metrics(folder, name))
    return sorted((row for row in rows if "step" in row), key=lambda row: row["step"])


def _figures_so_far(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    scores = (rows_of(folder, SCORES) or [{}])[-1]
    found = {key: scores.get(key) for key in ("top1", "top5")}
    found |= {f"probe_{key}": scores.get(key) for key in MEASURES}
    for row in rows_of(folder)[-1:]:
        found["training_seconds"] = row.get("seconds")
        if "model.backbone" not in settings:  # a classifier's final loss is that of validation
            found["loss"] = row.get("loss")
        if (path := folder / "plan.json").exists():
            plan = read_plan(path)
            step = int(row["step"])
            found["images"] = step * plan.batch_size
            found["equivalent_epochs"] = plan.progress(step) * plan.equivalent_epochs
    return {key: value for key, value in found.items() if value is not None}


def _figures(results: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": results[key] for key in FIGURES if key in results}
