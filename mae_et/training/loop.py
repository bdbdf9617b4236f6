"""The loop of every training: schedule, step, metrics, when to save and when to stop."""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from torch import Tensor

from mae_et.checkpoints.store import prune_checkpoints, save_checkpoint
from mae_et.config.files import to_yaml
from mae_et.config.schema import duration_in_steps
from mae_et.curriculum.schedule import PlannedStage
from mae_et.errors import Interrupted
from mae_et.io.metrics_file import Row
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.runtime.signals import StopFlag
from mae_et.runtime.watchdog import heartbeat
from mae_et.training.metrics import MetricsWindow
from mae_et.training.nonfinite import check_state
from mae_et.training.optim import set_schedule
from mae_et.training.run import Run

AnyBatch = TypeVar("AnyBatch")
Step = Callable[[Run, PlannedStage, Iterable[AnyBatch]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepOutcome:
    """What is due after a step."""

    stage: PlannedStage
    """The step's stage."""
    row: Row | None
    """Metrics to log, where a row is complete."""
    saving: bool
    """Whether the state is to be saved."""
    last: bool
    """Whether this was the last step."""
    stopping: bool
    """Whether the run stops here, for a signal: there is time to save and for nothing else."""


def steps(
    run: Run, batches: Iterator[AnyBatch], step: Step[AnyBatch], stopped: StopFlag
) -> Iterator[StepOutcome]:
    """Train from the state's step to the plan's last, and say after each step what is due.

    What the caller does between two steps is left out of the measured time. Every process goes
    through the same moments.

    Args:
        run: the run.
        batches: micro-batches, from the state's step on.
        step: one update of the weights.
        stopped: raised by a signal.

    Raises:
        Diverged: see `MetricsWindow.close`.
        Interrupted: a process was asked to stop; raised after the moment in which to save.
    """
    plan, world, state, output = run.plan, run.world, run.state, run.config.output
    log_every, save_every, keep_every = (
        duration_in_steps(duration or plan.steps, plan.steps)
        for duration in (output.log_every, output.checkpoint_every, output.keep_every)
    )
    window = MetricsWindow(world.device)
    heartbeat()
    while state.step < plan.steps:
        stage = plan.at(state.step)
        set_schedule(state.optimizer, plan.progress(state.step), run.config.optim)
        micro_batches = window.timed(islice(batches, run.accumulation(stage)))
        window.add(*step(run, stage, micro_batches))
        state.step += 1
        heartbeat()

        last = state.step == plan.steps
        stopping = distributed.any_rank(stopped.signal is not None, world) and not last
        saving = state.step % save_every == 0 or state.step % keep_every == 0 or last or stopping
        stage_ends = state.step == stage.start + stage.steps
        due = state.step % log_every == 0 or stage_ends or saving
        row = window.close(run, stage) if due else None
        with window.paused():
            yield StepOutcome(stage, row, saving, last, stopping)
        heartbeat()
        if stopping:
            distributed.barrier(world)
            raise Interrupted(state.step, stopped.signal or signal.SIGTERM, str(output.dir))


def save(run: Run, monitor: RunLogger | None) -> None:
    """Write a checkpoint, after the rows that it promises; delete those no longer wanted.

    Every process takes part, in case the state is sharded; only the main one has a monitor.

    Raises:
        Diverged: the state is not finite, and nothing was written.
    """
    check_state(run)
    state = run.state.to_dict()
    if monitor is None:
        return
    monitor.flush()
    output, plan = run.config.output, run.plan
    folder = output.dir / "checkpoints"
    save_checkpoint(folder, state, to_yaml(run.config), plan.to_dict(), run.origin)
    every = output.keep_every
    keep_every = None if every is None else duration_in_steps(every, plan.steps)
    prune_checkpoints(folder, output.keep_last, keep_every)
