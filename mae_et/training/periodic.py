"""Work between the steps of a run, such as scoring or drawing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from mae_et.config.duration import Duration, is_due
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.training.run import Run


class Periodic(ABC):
    """Work at regular intervals and after the last step; every rank takes part."""

    before_first_step = False
    """Whether the work is also due before the first step."""

    def __init__(self, run: Run, every: Duration):
        self.run, self.every = run, run.in_steps(every)

    def due(self, step: int) -> bool:
        """Return whether the work is due after this many steps; 0: before the first."""
        starts = step > 0 or self.before_first_step
        return starts and is_due(step, self.every, self.run.plan.steps)

    def recorded(self, step: int, logger: RunLogger) -> bool:
        """Return whether a resumed run's record already has the scores of a step."""
        return logger.has_scores(step)

    @abstractmethod
    def do(self, logger: RunLogger | None) -> None:
        """Do the work with the current state; only the main rank has a logger."""


def do_missed_work(run: Run, logger: RunLogger | None, periodic: Sequence[Periodic]) -> None:
    """Do the work due before the first step, or missed by a run killed after its checkpoint."""
    step = run.state.step
    for work in periodic:
        if work.due(step):
            missing = logger is not None and not work.recorded(step, logger)
            if distributed.any_rank(missing, run.world):
                do_work([work], logger)


def do_work(due: Sequence[Periodic], logger: RunLogger | None) -> None:
    """Do work with compiled blocks run eagerly: its shapes would compile further graphs."""
    for work in due:
        with torch.compiler.set_stance("force_eager"):
            work.do(logger)
