"""Read the runs of a report from their folders, finished or not."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mae_et.curriculum.table import COMPUTE_UNITS
from mae_et.errors import UserError, listed
from mae_et.io.metrics_file import METRICS
from mae_et.monitoring.compared_runs import check_existence, names_of, no_run
from mae_et.monitoring.run_record import RunRecord
from mae_et.runtime.console import say

COLOURS = 8


@dataclass(frozen=True)
class ReportedRun(RunRecord):
    """A run among those of a report."""

    number: int
    """Position among the runs, from 1."""
    name: str
    """Unique among the runs."""

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
    def unit(self) -> str:
        """Unit of compute."""
        return COMPUTE_UNITS.get(str(self.settings.get("curriculum.cost")), "units")

    @property
    def share(self) -> float:
        """Fraction of the plan's compute that is done, in [0, 1]."""
        return self.plan.progress(self.step) if self.plan else 0.0

    def compute(self, step: float) -> float | None:
        """Return the compute done after a step, in `unit`."""
        return None if self.plan is None else self.plan.compute_before(int(step))

    def seconds(self, step: float) -> float | None:
        """Return the training time at the last row up to a step; 0 at the start."""
        if not step:
            return 0.0
        place = bisect_right(self.rows, step, key=lambda row: row["step"])
        return self.rows[place - 1].get("seconds") if place else None


def read_runs(folders: list[Path]) -> list[ReportedRun]:
    """Open run folders."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run folder is given twice")
    check_existence(folders)
    runs = [f for f in folders if (f / "config.yaml").exists() or (f / METRICS).exists()]
    others = [folder for folder in folders if folder not in runs]
    if not runs:
        raise no_run(others[0])
    if others:
        say(f"not reported, as they hold no run: {listed(others)}")
    return [ReportedRun(*each) for each in zip(runs, count(1), names_of(runs), strict=False)]
