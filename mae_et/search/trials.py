"""A trial is an ordinary pre-training run, and its score; what is known is not done again.

A search is a function of the scores of its trials. Every score is in the journal as soon as it is
known, so a search that was stopped is started from the beginning, finds what it had, and goes on;
a trial that was stopped goes on from its newest checkpoint, as every run does.
"""

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_et.checkpoints.store import list_checkpoints, load_checkpoint, save_checkpoint
from mae_et.config.files import to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.schedule import Plan
from mae_et.errors import Diverged, RunFailed
from mae_et.io.atomic import write_text_atomically
from mae_et.io.metrics_file import read_metrics
from mae_et.pretraining import pretrain
from mae_et.search.journal import Fact, Journal

Objective = Callable[[Path], float]
# Trains runs to the end, or up to a step; returns why each diverged, None for those that did not.
Runner = Callable[[Sequence[PretrainConfig], int | None], list[str | None]]


@dataclass(frozen=True)
class Fork:
    """Where a trial starts that does not start anew."""

    folder: Path
    """Run folder of another trial."""
    step: int
    """Step of its checkpoint that is taken."""


@dataclass(frozen=True)
class Trial:
    """A run to be scored."""

    config: PretrainConfig
    plan: Plan
    start: Fork | None = None

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.output.dir

    @property
    def name(self) -> str:
        """Its name in the journal."""
        return self.folder.name

    @property
    def equivalent_epochs(self) -> float:
        """Compute of its own, without what it starts from."""
        plan = self.plan
        before = plan.compute_before(self.start.step) if self.start else 0.0
        return (plan.compute - before) / (plan.base_cost * plan.dataset_size)


class Trials:
    """Scores trials, each once.

    Args:
        journal: what is known.
        objective: from a run folder to what is to be high.
        run: trains runs.
        together: whether `run` is given all that do not wait for each other at once.
    """

    def __init__(self, journal: Journal, objective: Objective, run: Runner, together: bool = False):
        self.journal, self.objective, self.run = journal, objective, run
        self.together = together
        self.known = {fact["trial"]: fact for fact in journal.facts if "trial" in fact}

    def scores(self, wanted: Sequence[Trial]) -> list[float]:
        """Return the scores of trials that do not wait for each other; -inf of those that failed.

        Raises:
            RunFailed: the objective fails, or a run does for a reason that is not its curriculum.
            Interrupted: a signal asked to stop.
        """
        missing = [trial for trial in wanted if trial.name not in self.known]
        for group in [missing] if self.together and missing else [[trial] for trial in missing]:
            for trial in group:
                branch_off(trial)
                self._say(f"{trial.name} ({trial.equivalent_epochs:.2f} equivalent epochs)")
            failures = self.run([trial.config for trial in group], None)
            for trial, failed in zip(group, failures, strict=True):
                self.settle(trial, None if failed else self.measure(trial), failed)
        return [self.score(trial) for trial in wanted]

    def score(self, trial: Trial) -> float:
        """Return the score of a trial that is settled."""
        value = self.known[trial.name]["value"]
        return -math.inf if value is None else value

    def measure(self, trial: Trial) -> float:
        """Return the objective of a trial's run as it is now.

        Raises:
            RunFailed: it fails, or is no finite number.
        """
        value = self.objective(trial.folder)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RunFailed(f"search.objective returned {value!r} for {trial.folder}, not a number")
        return number

    def score_at(self, trial: Trial, step: int) -> float | None:
        """Return the objective of a trial's run after a step; None, and settled, if it failed.

        Raises:
            Interrupted: a signal asked to stop.
        """
        key = {"rung": trial.name, "step": step}
        for fact in self.journal.facts:
            if key.items() <= fact.items():
                return fact["value"]
        self._say(f"{trial.name} up to step {step}")
        (failed,) = self.run([trial.config], step)
        if failed is not None:
            self.settle(trial, None, failed)
            return None
        value = self.measure(trial)
        self.journal.note({**key, "value": value})
        return value

    def settle(
        self, trial: Trial, value: float | None, failed: str | None = None, step: int | None = None
    ) -> None:
        """Write a trial's score down.

        Args:
            trial: the trial.
            value: its score; None where it has none.
            failed: why it has none.
            step: the last one that was trained, of trials that are given up.
        """
        share = 1.0 if step is None else trial.plan.progress(step)
        fact: Fact = {
            "trial": trial.name,
            "value": value,
            "bandwidths": [stage.bandwidth for stage in trial.plan.stages],
            "magnitudes": [stage.magnitude for stage in trial.plan.stages],
            "images": trial.plan.images if step is None else step * trial.plan.batch_size,
            "equivalent_epochs": round(share * trial.equivalent_epochs, 4),
            "seconds": seconds_of(trial),
            "failed": failed,
        }
        self.journal.note(fact)
        self.known[trial.name] = fact
        self._say(f"{trial.name}: {failed or f'{value:.2f}'}")

    def discard(self, trials: Sequence[Trial]) -> None:
        """Delete the checkpoints of trials that are out of the race."""
        for trial in trials:
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)

    def _say(self, words: str) -> None:
        print(f"mae-et: search: {words}", file=sys.stderr, flush=True)


def branch_off(trial: Trial) -> None:
    """Give a trial's folder the state, and the metrics, of the run that it starts from.

    The run then goes on "as if it had never stopped": it is the run that has all of the trial's
    stages, of which the first are not trained again.

    Raises:
        RunFailed: the checkpoint is gone or damaged.
    """
    checkpoints = trial.folder / "checkpoints"
    if trial.start is None or list_checkpoints(checkpoints):
        return
    path = trial.start.folder / "checkpoints" / f"step-{trial.start.step:08d}.pt"
    try:
        saved = load_checkpoint(path)
    except ValueError as error:
        raise RunFailed(f"the search cannot go on from {path.parent}: {error}") from None
    rows = (trial.start.folder / "metrics.jsonl").read_text(encoding="utf-8")
    write_text_atomically(trial.folder / "metrics.jsonl", rows)  # rows after the step are dropped
    state = {key: saved[key] for key in ("model", "optimizer", "scaler", "step", "seconds")}
    state |= {"ema": None, "micro_batch": None}  # parts are fitted to the bandwidths anew
    save_checkpoint(checkpoints, state, to_yaml(trial.config), trial.plan.to_dict())


def run_here(
    configs: Sequence[PretrainConfig], stop_after_step: int | None = None
) -> list[str | None]:
    """Train runs in this process, one after another; see `Runner`.

    Raises:
        UserError: see `pretrain`.
        RunFailed: a run failed for another reason than its numbers.
        Interrupted: a signal asked to stop.
    """
    failures: list[str | None] = []
    for config in configs:
        try:
            pretrain(config, stop_after_step)
            failures.append(None)
        except Diverged as error:
            failures.append(str(error))
    return failures


def seconds_of(trial: Trial) -> float:
    """Return the time that a trial trained, without what it starts from."""
    rows = read_metrics(trial.folder)
    first = trial.start.step if trial.start else 0
    return round(sum(row["window_seconds"] for row in rows if row["step"] > first), 1)
