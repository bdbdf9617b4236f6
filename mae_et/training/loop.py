"""The training loop: schedule, step, metrics, when to save and when to stop."""

import signal
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from mae_et.curriculum.plan import PlannedStage
from mae_et.data.bad_images import BadImages
from mae_et.data.batch import AnyBatch
from mae_et.errors import Interrupted
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.runtime.watchdog import heartbeat
from mae_et.training.checkpoint_writer import CheckpointWriter
from mae_et.training.efficiency.compile import report_compilation
from mae_et.training.metrics import MetricsWindow
from mae_et.training.optim import set_schedule
from mae_et.training.periodic import Periodic, do_missed_work, do_work
from mae_et.training.run import Run
from mae_et.training.step import Loss, train_step


def train(
    run: Run,
    batches: Iterator[AnyBatch],
    loss_of: Loss,
    logger: RunLogger | None,
    checkpoints: CheckpointWriter,
    periodic: Sequence[Periodic] = (),
    bad_images: BadImages | None = None,
) -> None:
    """Train from the state's step to the plan's last, or until `run.stop_after_step`.

    Micro-batches start at the state's step. `bad_images` has those that could not be read, or is
    None if the first one stops the run. Checkpoints are written while training continues; the
    last one, and one after a signal, while it waits. The time of periodic work does not count.

    Raises:
        Diverged: the loss, a gradient or the state is not finite (see `MetricsWindow.close`).
        Interrupted: a signal asked a rank to stop; the state is saved.
    """
    plan, world, state, stopped = run.plan, run.world, run.state, run.stopped
    do_missed_work(run, logger, periodic)
    state.model.train()
    end = plan.steps if run.stop_after_step is None else min(plan.steps, run.stop_after_step)
    output = run.config.output
    log_every, save_every = map(run.in_steps, (output.log_every, output.checkpoint_every))
    window = MetricsWindow(world.device, bad_images)
    stopped.saves = world.size > 1  # then all ranks stop at the same step
    heartbeat()
    while state.step < end:
        asked_to_stop = distributed.any_rank_async(
            lambda: stopped.signal is not None or checkpoints.failed, world
        )
        stage = take_step(run, batches, loss_of, window)
        stopped.saves = True
        heartbeat()

        stops = asked_to_stop() and state.step < end
        saving = stops or state.step == end or state.step % save_every == 0 or run.keeps(state.step)
        stage_ends = state.step == stage.start + stage.steps
        row_ends = state.step % log_every == 0 or stage_ends or saving
        row = window.close(run, stage) if row_ends else None
        # After a signal there is only time to save.
        due = [] if stops else [work for work in periodic if work.due(state.step)]
        with window.paused(works=saving or bool(due)):
            if logger is not None:
                logger.advance(state.step)
                if row is not None:
                    logger.log(row)
            if saving:
                save(checkpoints, window, waits=stops or state.step == end)
            do_work(due, logger)
        heartbeat()
        if stops:
            distributed.barrier(world)
            raise Interrupted(state.step, stopped.signal or signal.SIGTERM, str(output.dir))


def take_step(
    run: Run, batches: Iterator[AnyBatch], loss_of: Loss, window: MetricsWindow
) -> PlannedStage:
    """Take the run's next step, with the schedule of its stage, and return that stage."""
    plan, state = run.plan, run.state
    stage = plan.at(state.step)
    if state.step == stage.start:
        torch.cuda.empty_cache()  # blocks of one bandwidth's sizes fit the next one's badly
    set_schedule(state.optimizer, plan.progress(state.step), run.config.optim)
    micro_batches = window.timed(islice(batches, run.accumulation(stage)))
    window.add(*train_step(run, stage, micro_batches, loss_of))
    if state.ema is not None:
        state.ema.update(state.model, state.step)
    report_compilation(stage.bandwidth)
    state.step += 1
    return stage


def save(checkpoints: CheckpointWriter, window: MetricsWindow, waits: bool) -> None:
    """Save a checkpoint, and measure for how long it holds up training; see its `save`."""
    before = time.perf_counter()
    checkpoints.save(waits)
    window.checkpoint_seconds += time.perf_counter() - before
