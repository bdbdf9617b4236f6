"""A trial: an ordinary pre-training run and its score, computed at most once.

A search is a deterministic function of its trials' scores. Each score is logged as soon as it is
known, so a restarted search replays its decisions from the log, and an interrupted trial resumes
from its newest checkpoint like any run.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mae_et.checkpoints.listing import list_checkpoints
from mae_et.checkpoints.store import load_checkpoint, save_checkpoint
from mae_et.config.files import to_record
from mae_et.config.schema import PretrainConfig, Stage
from mae_et.curriculum.plan import Plan
from mae_et.errors import Diverged, RunFailed
from mae_et.io.atomic import write_text_atomically
from mae_et.io.metrics_file import read_metrics
from mae_et.pretraining import pretrain
from mae_et.runtime.console import say
from mae_et.search.config import SearchConfig
from mae_et.search.trial_log import Record, TrialLog
from mae_et.training.plan import make_plan

Objective = Callable[[Path], float]
# Trains runs to the end, or to a step; returns why each diverged, or None if it did not.
Runner = Callable[[Sequence[PretrainConfig], int | None], list[str | None]]


@dataclass(frozen=True)
class SearchResult:
    """The best curriculum of a search."""

    stages: tuple[Stage, ...]
    trial: "Trial"
    """The best trial."""
    value: float
    """Its score."""


@dataclass(frozen=True)
class Fork:
    """A checkpoint of another trial to start from."""

    folder: Path
    """Run folder of the other trial."""
    step: int


@dataclass(frozen=True)
class Trial:
    """A run to score."""

    config: PretrainConfig
    plan: Plan
    start: Fork | None = None
    """Where it starts; from scratch by default."""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.output.dir

    @property
    def name(self) -> str:
        """Its name in the log."""
        return self.folder.name

    @property
    def equivalent_epochs(self) -> float:
        """Compute of the trial itself, excluding that of its starting checkpoint."""
        plan = self.plan
        before = plan.compute_before(self.start.step) if self.start else 0.0
        return (plan.compute - before) / (plan.base_cost * plan.dataset_size)


class Trials:
    """Score trials, each once, also over restarts; see `search` for the arguments."""

    def __init__(self, log: TrialLog, objective: Objective, run: Runner, parallel: bool = False):
        self.log, self.objective, self.run = log, objective, run
        self.parallel = parallel
        self.known = {record["trial"]: record for record in log.records if "trial" in record}

    def scores(self, trials: Sequence[Trial]) -> list[float]:
        """Return the scores of independent trials; -inf for diverged ones."""
        missing = [trial for trial in trials if trial.name not in self.known]
        for group in [missing] if self.parallel and missing else [[trial] for trial in missing]:
            for trial in group:
                fork_checkpoint(trial)
                say(f"search: {trial.name} ({trial.equivalent_epochs:.2f} equivalent epochs)")
            failures = self.run([trial.config for trial in group], None)
            for trial, failed in zip(group, failures, strict=True):
                self.record(trial, None if failed else self.measure(trial), failed)
        return [self.score(trial) for trial in trials]

    def score(self, trial: Trial) -> float:
        """Return the logged score of a trial."""
        value = self.known[trial.name]["value"]
        return -math.inf if value is None else value

    def measure(self, trial: Trial) -> float:
        """Return the objective of a trial's run in its current state."""
        value: Any = self.objective(trial.folder)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RunFailed(f"search.objective returned {value!r} for {trial.folder}, not a number")
        return number

    def score_at(self, trial: Trial, step: int) -> float | None:
        """Train to a step and return the objective; None, with a log entry, on divergence."""
        key = {"rung": trial.name, "step": step}
        for record in self.log.records:
            if key.items() <= record.items():
                return record["value"]
        say(f"search: {trial.name} to step {step}")
        (failed,) = self.run([trial.config], step)
        if failed is not None:
            self.record(trial, None, failed)
            return None
        value = self.measure(trial)
        self.log.append({**key, "value": value})
        return value

    def record(
        self, trial: Trial, value: float | None, failed: str | None = None, step: int | None = None
    ) -> None:
        """Log a trial's score, or why it has none; `step` is the last one of a pruned trial."""
        share = 1.0 if step is None else trial.plan.progress(step)
        record: Record = {
            "trial": trial.name,
            "value": value,
            "bandwidths": [stage.bandwidth for stage in trial.plan.stages],
            "magnitudes": [stage.magnitude for stage in trial.plan.stages],
            "images": trial.plan.images if step is None else step * trial.plan.batch_size,
            "equivalent_epochs": round(share * trial.equivalent_epochs, 4),
            "seconds": training_seconds(trial),
            "failed": failed,
        }
        self.log.append(record)
        self.known[trial.name] = record
        say(f"search: {trial.name}: {failed or f'{value:.2f}'}")

    def delete_checkpoints(self, trials: Sequence[Trial]) -> None:
        """Delete the checkpoints of eliminated trials."""
        for trial in trials:
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


def whole_trial(
    config: SearchConfig,
    images: int,
    stages: tuple[Stage, ...],
    shares_of: Literal["compute", "images"] = "compute",
    suffix: str = "",
) -> Trial:
    """Return the trial of a whole curriculum, named by its bandwidths and a suffix."""
    name = "B" + "-".join(f"{stage.bandwidth:03d}" for stage in stages) + suffix
    folder = config.output.dir / "trials" / name
    run = config.run_of(stages, config.budget, folder, shares_of)
    return Trial(run, make_plan(run, images))


def fork_checkpoint(trial: Trial) -> None:
    """Copy the starting checkpoint and its metrics into a trial's folder.

    The trial then resumes from it like an interrupted run whose first stages are already trained.
    """
    checkpoints = trial.folder / "checkpoints"
    if trial.start is None or list_checkpoints(checkpoints):
        return
    path = trial.start.folder / "checkpoints" / f"step-{trial.start.step:08d}.pt"
    try:
        saved = load_checkpoint(path)
    except ValueError as error:
        raise RunFailed(f"the search cannot resume from {path.parent}: {error}") from None
    rows = (trial.start.folder / "metrics.jsonl").read_text(encoding="utf-8")
    write_text_atomically(trial.folder / "metrics.jsonl", rows)  # resuming drops the later rows
    state = {key: saved[key] for key in ("model", "optimizer", "scaler", "step", "seconds")}
    state |= {"ema": None, "micro_batch": None}  # micro-batches are fitted to the new bandwidths
    code = {"code": saved["origin"].get("code")}
    save_checkpoint(checkpoints, state, to_record(trial.config), trial.plan.to_dict(), code)


def run_here(
    configs: Sequence[PretrainConfig], stop_after_step: int | None = None
) -> list[str | None]:
    """Train runs in this process, one after another; see `Runner`."""
    failures: list[str | None] = []
    for config in configs:
        try:
            pretrain(config, stop_after_step)
            failures.append(None)
        except Diverged as error:
            failures.append(str(error))
    return failures


def training_seconds(trial: Trial) -> float:
    """Return the training time of a trial, excluding that of its starting checkpoint."""
    rows = read_metrics(trial.folder)
    first = trial.start.step if trial.start else 0
    return round(sum(row["window_seconds"] for row in rows if row["step"] > first), 1)
