"""Read the content of a report from run folders, finished or not."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mae_et.curriculum.plan import Plan, read_plan
from mae_et.curriculum.table import COMPUTE_UNITS
from mae_et.errors import UserError, listed
from mae_et.io.metrics_file import METRICS, SCORES, Row
from mae_et.io.plain_files import read_bytes
from mae_et.monitoring.compared_runs import names_of, no_run
from mae_et.monitoring.run_figures import figures_of, results_of, rows_of, settings_of
from mae_et.runtime.console import say

COLOURS = 8


@dataclass(frozen=True)
class Record:
    """A run as read from its folder."""

    folder: Path
    number: int
    """Position among the runs of the report, from 1."""
    name: str
    """Unique among the runs of the report."""
    text: str
    """Config as YAML."""
    settings: dict[str, Any]
    """Config by flat keys such as `optim.base_lr`."""
    plan: Plan | None
    rows: list[Row]
    """Metrics; values are numbers or booleans."""
    scores: list[Row]
    """Validation and probe scores, of the same types."""
    results: dict[str, Any]
    """Final figures; empty for an unfinished run."""
    figures: dict[str, Any]
    """Figures to compare, so far if it is unfinished, and those of results inside the folder."""

    @property
    def colour(self) -> int:
        """Number of its colour on the page."""
        return (self.number - 1) % COLOURS

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return bool(self.results)

    @property
    def is_classifier(self) -> bool:
        """Whether the run trains a classifier."""
        return "model.backbone" in self.settings or any("top1" in row for row in self.scores)

    @property
    def step(self) -> int:
        """Steps done according to the rows of metrics."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def unit(self) -> str:
        """Unit of compute."""
        return COMPUTE_UNITS.get(str(self.settings.get("curriculum.cost")), "units")

    @property
    def share(self) -> float:
        """Fraction of the plan's compute that is done, in [0, 1]."""
        return self.plan.progress(self.step) if self.plan else 0.0

    def epochs(self, step: float) -> float | None:
        """Return the compute done after a step, in equivalent epochs."""
        if self.plan is None:
            return None
        return self.plan.progress(int(step)) * self.plan.equivalent_epochs

    def compute(self, step: float) -> float | None:
        """Return the compute done after a step, in `unit`."""
        return None if self.plan is None else self.plan.compute_before(int(step))

    def images(self, step: float) -> float | None:
        """Return the images seen after a step, repeats included."""
        return None if self.plan is None else int(step) * self.plan.batch_size

    def seconds(self, step: float) -> float | None:
        """Return the training time at the last row up to a step; 0 at the start."""
        if not step:
            return 0.0
        place = bisect_right(self.rows, step, key=lambda row: row["step"])
        return self.rows[place - 1].get("seconds") if place else None


def read_records(folders: list[Path]) -> list[Record]:
    """Read run folders."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run folder is given twice")
    for missing in (folder for folder in folders if not folder.exists()):
        raise UserError(f"there is no run folder {missing}")
    runs = [f for f in folders if (f / "config.yaml").exists() or (f / METRICS).exists()]
    others = [folder for folder in folders if folder not in runs]
    if not runs:
        raise no_run(others[0])
    if others:
        say(f"not reported, as they hold no run: {listed(others)}")
    return [_read(*each) for each in zip(runs, count(1), names_of(runs), strict=False)]


def _read(folder: Path, number: int, name: str) -> Record:
    config, plan = folder / "config.yaml", folder / "plan.json"
    settings = settings_of(folder)
    return Record(
        folder,
        number,
        name,
        read_bytes(config).decode(errors="replace") if config.exists() else "",
        settings,
        read_plan(plan) if plan.exists() else None,
        rows_of(folder),
        rows_of(folder, SCORES),
        results_of(folder),
        figures_of(folder, settings),
    )
