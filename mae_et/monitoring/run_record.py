"""Read a run folder, finished or not: its config, plan, rows, results and figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mae_et.config.files import flat_keys
from mae_et.config.plain_yaml import parse_yaml
from mae_et.curriculum.plan import Plan, read_plan
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
from mae_et.monitoring.summaries import MEASURES

PROBES = ("probes", "knn", "linear-probe")
"""Folders inside a run folder with scores of its encoder."""
INNER = (*PROBES, "finetune", "finetune-linear", "finetune-attentive", "evaluate")
"""Usual folders inside it with results that started from the run."""
IMAGES = "reconstructions"


@dataclass(frozen=True)
class RunRecord:
    """What a run folder records; each file is read when it is first needed.

    Raises:
        UserError: on use, if a file is damaged.
    """

    folder: Path

    @cached_property
    def text(self) -> str | None:
        """Config as YAML; None if there is none."""
        path = self.folder / "config.yaml"
        return read_text(path) if path.exists() else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Config by flat keys (`optim.base_lr`), without `output`; empty if there is none."""
        if self.text is None:
            return {}
        try:
            flat = flat_keys(parse_yaml(self.text))
            return {key: value for key, value in flat.items() if not key.startswith("output.")}
        except (AttributeError, RecursionError, TypeError, ValueError, yaml.YAMLError):
            raise UserError(f"{self.folder / 'config.yaml'} is damaged") from None

    @cached_property
    def plan(self) -> Plan | None:
        """Curriculum in whole steps; None if there is none."""
        path = self.folder / "plan.json"
        return read_plan(path) if path.exists() else None

    @cached_property
    def rows(self) -> list[Row]:
        """Metrics in the order of their steps; values are numbers or booleans."""
        return self._rows(METRICS)

    @cached_property
    def scores(self) -> list[Row]:
        """Validation and probe scores, of the same types."""
        return self._rows(SCORES)

    @property
    def last_row(self) -> Row:
        """Last row of metrics without damage in the values that `mae-et status` uses, or empty."""
        return next(filter(_is_whole, reversed(read_metrics(self.folder))), {})

    @property
    def has_results(self) -> bool:
        """Whether the final figures were written, though they may be damaged since."""
        return (self.folder / RESULTS).exists()

    @cached_property
    def results(self) -> dict[str, Any]:
        """Final figures; empty for an unfinished run."""
        return with_current_names(read_mapping(self.folder / RESULTS)) if self.has_results else {}

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Figures of the run, and of the scores and the classifiers in folders inside it.

        Those of an unfinished run are of its last rows of metrics and scores.

        Names of figures on other data or with other settings include these: `cifar10 pool=cls knn`.
        If such a name stands for several scores, it is the latest; names of the earlier ones
        include in what they differ from it.
        """
        found = _figures(self.results or self._figures_so_far(), "")
        settings = self.settings
        own = settings.get("data.root") or settings.get("data.name") or "synthetic"
        for inner in _inner_folders(self.folder):
            records = read_records(inner)
            kind = "" if inner.name in PROBES else f"{inner.name} "
            if not kind or "top1" in records[0]:
                for name, record in _named(records, str(own)):
                    found |= _figures(record, name + kind)
        return found

    @property
    def step(self) -> int:
        """Steps done according to the rows of metrics."""
        return self.rows[-1]["step"] if self.rows else 0

    def epochs(self, step: float) -> float | None:
        """Return the compute done after a step, in equivalent epochs."""
        if self.plan is None:
            return None
        return self.plan.progress(int(step)) * self.plan.equivalent_epochs

    def images(self, step: float) -> float | None:
        """Return the images seen after a step, repeats included."""
        return None if self.plan is None else int(step) * self.plan.batch_size

    def reconstructions(self, last: int) -> dict[int, Path]:
        """Return the saved images by step, up to step `last`: a resumed run may have later ones."""
        found = (self.folder / IMAGES).glob("step-*.png")
        paths = {path.stem.removeprefix("step-"): path for path in found}
        steps = {int(digits): path for digits, path in paths.items() if digits.isdecimal()}
        return {step: steps[step] for step in sorted(steps) if step <= last}

    def _rows(self, name: str) -> list[Row]:
        read = read_metrics(self.folder, name)
        rows = ({k: v for k, v in row.items() if is_plausible(v)} for row in read)
        return sorted((row for row in rows if "step" in row), key=lambda row: row["step"])

    def _figures_so_far(self) -> dict[str, Any]:
        scores = self.scores[-1] if self.scores else {}
        found = {key: scores.get(key) for key in ("top1", "top5")}
        found |= {f"probe_{key}": scores.get(key) for key in MEASURES}
        counted = "val_images" if "top1" in scores else "probe_val_images"
        found[counted] = scores.get("val_images") or None
        if self.rows:
            row = self.rows[-1]
            found["training_seconds"] = row.get("seconds")
            if "model.backbone" not in self.settings:  # a classifier's final loss is validation's
                found["loss"] = row.get("loss")
            found["images"] = self.images(self.step)
            found["equivalent_epochs"] = self.epochs(self.step)
        return {key: value for key, value in found.items() if value is not None}


def image_path(folder: Path, step: int) -> Path:
    """Return the path of a run's reconstructions at a step."""
    return folder / IMAGES / f"step-{step:08d}.png"


def _is_whole(row: Row) -> bool:
    given = [row.get(key) for key in ("step", "stage", "time", "seconds", "compute")]
    keys = ("bandwidth", "loss", "images_per_second", "window_seconds")
    return all(map(is_plausible, (*given, *(row.get(key) or 0 for key in keys))))


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


def _figures(results: dict[str, Any], prefix: str) -> dict[str, Any]:
    provenance = results.get("provenance")  # has the number of images of kNN and linear probe
    found = provenance | results if isinstance(provenance, dict) else results
    return {f"{prefix}{key}": found[key] for key in FIGURES if key in found}
