"""The loop of every training: schedule, step, metrics, when to save and when to stop."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mae_et.checkpoints.store import prune_checkpoints, save_checkpoint
from mae_et.config.duration import duration_in_steps
from mae_et.config.files import to_yaml
from mae_et.curriculum.plan import PlannedStage
from mae_et.errors import Interrupted
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.runtime.watchdog import heartbeat
from mae_et.training.compile import eagerly
from mae_et.training.memory import release_cached_memory
from mae_et.training.metrics import MetricsWindow
from mae_et.training.nonfinite import check_state
from mae_et.training.optim import decay_start, set_schedule
from mae_et.training.run import Run


class StagedBatch(Protocol):
    """A micro-batch that carries the stage it was made for."""

    @property
    def stage(self) -> Tensor:
        """Index of the stage, int64 [B]."""


AnyBatch = TypeVar("AnyBatch", bound=StagedBatch)
Step = Callable[[Run, PlannedStage, Iterable[AnyBatch]], tuple[Tensor, Tensor]]


class Periodic(Protocol):
    """Work that is due at some steps, such as scoring or drawing; every rank takes part."""

    def due(self, step: int) -> bool:
        """Return whether the work is due after this number of steps; 0: before the first."""

    def recorded(self, step: int, logger: RunLogger) -> bool:
        """Return whether the record of a resumed run holds the work of a step."""

    def do(self, logger: RunLogger | None) -> None:
        """Do the work with the current state; only the main rank has a logger."""


def train(
    run: Run,
    batches: Iterator[AnyBatch],
    step: Step[AnyBatch],
    logger: RunLogger | None,
    periodic: Sequence[Periodic] = (),
) -> None:
    """Train from the state's step to the plan's last, or to `run.stop_after_step`.

    Args:
        run: the run.
        batches: micro-batches, from the state's step on.
        step: one update of the weights.
        logger: records and checkpoints; None on every rank but the main one.
        periodic: work between steps; its time is not counted as training.

    Raises:
        Diverged: the loss, a gradient or the state is not finite (see `MetricsWindow.close`).
        Interrupted: a signal asked a rank to stop; the state is saved.
    """
    plan, world, state, output = run.plan, run.world, run.state, run.config.output
    stopped, last = run.stopped, run.stop_after_step
    do_missed_work(run, logger, periodic)
    state.model.train()
    end = plan.steps if last is None else min(plan.steps, last)
    log_every, save_every, keep_every = (
        duration_in_steps(duration or plan.steps, plan.steps)
        for duration in (output.log_every, output.checkpoint_every, output.keep_every)
    )
    branch_step = decay_start(plan, run.config.optim)
    window = MetricsWindow(world.device)
    stopped.saves = world.size > 1  # then all ranks stop at the same step
    heartbeat()
    while state.step < end:
        stage = plan.at(state.step)
        if state.step == stage.start:
            release_cached_memory(world.device)
        set_schedule(state.optimizer, plan.progress(state.step), run.config.optim)
        micro_batches = of_stage(islice(batches, run.accumulation(stage)), stage)
        window.add(*step(run, stage, window.timed(micro_batches)))
        state.step += 1
        stopped.saves = True
        heartbeat()

        stops = distributed.any_rank(stopped.signal is not None, world) and state.step < end
        saving = state.step % save_every == 0 or state.step % keep_every == 0
        saving = saving or stops or state.step in {end, branch_step}
        stage_ends = state.step == stage.start + stage.steps
        row_ends = state.step % log_every == 0 or stage_ends or saving
        row = window.close(run, stage) if row_ends else None
        # A signal leaves time to save, no more.
        due = [] if stops else [work for work in periodic if work.due(state.step)]
        with window.paused(works=saving or bool(due)):
            if logger is not None:
                logger.advance(state.step)
                if row is not None:
                    logger.log(row)
            if saving:
                save(run, logger)
            do_work(due, logger)
        heartbeat()
        if stops:
            distributed.barrier(world)
            raise Interrupted(state.step, stopped.signal or signal.SIGTERM, str(output.dir))


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
        with eagerly():
            work.do(logger)


def of_stage(batches: Iterator[AnyBatch], stage: PlannedStage) -> Iterator[AnyBatch]:
    """Yield micro-batches that were made for a stage; raise a RuntimeError at any other."""
    for batch in batches:
        made_for = int(batch.stage[0])
        if made_for != stage.index:
            raise RuntimeError(f"a batch of stage {made_for} was loaded for stage {stage.index}")
        yield batch


def save(run: Run, logger: RunLogger | None) -> None:
    """Write a checkpoint after flushing the rows before it, and delete superseded checkpoints.

    Every rank takes part, because the state may be sharded; only the main rank has a logger.

    Raises:
        Diverged: the state is not finite; nothing is written.
    """
    check_state(run)
    state = run.state.to_dict()
    distributed.run_on_main(partial(_write, run, logger, state), run.world)


def _write(run: Run, logger: RunLogger | None, state: dict[str, Any]) -> None:
    """Write a checkpoint of a state, on the main rank."""
    if logger is None:
        return
    logger.flush()
    output, plan = run.config.output, run.plan
    folder = output.dir / "checkpoints"
    save_checkpoint(folder, state, to_yaml(run.config), plan.to_dict(), run.provenance)
    every = output.keep_every
    keep_every = None if every is None else duration_in_steps(every, plan.steps)
    branch_step = decay_start(plan, run.config.optim)
    prune_checkpoints(folder, output.keep_last, keep_every, branch_step)
