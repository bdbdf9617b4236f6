"""Score a classifier on the validation split while it is trained."""

from finetune.datasets import LabelledSplits
from finetune.results import evaluate_and_save_best
from mae_et.config.duration import duration_in_steps, is_due
from mae_et.monitoring.logger import RunLogger
from mae_et.training.run import Run


class PeriodicEvaluation:
    """Scores on the validation split, every `output.evaluate_every` and at the end (a `Periodic`).

    Args:
        run: the run; `output.evaluate_every` must be set.
        data: its data, with a validation split.
    """

    def __init__(self, run: Run, data: LabelledSplits):
        self.of, self.data = run, data
        self.every = duration_in_steps(run.config.output.evaluate_every, run.plan.steps)

    def due(self, step: int) -> bool:
        """Return whether scores are due after this number of steps."""
        return step > 0 and is_due(step, self.every, self.of.plan.steps)

    def recorded(self, step: int, logger: RunLogger) -> bool:
        """Return whether the record holds the scores of a step."""
        return logger.has_scores(step)

    def run(self, logger: RunLogger | None) -> None:
        """Score the weights as they are, and keep the best."""
        evaluate_and_save_best(self.of, self.data, logger)
