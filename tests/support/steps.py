"""Training steps that act before an update, for `pretrain(config, step=...)` and `classify`."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.pretraining import train_step


def wait_for_checkpoint(run: Any, seconds: float = 10.0) -> None:
    """Wait until the last checkpoint that is due, written in the background, is the newest."""
    step, output = run.state.step, run.config.output
    due = step - step % run.in_steps(output.checkpoint_every)
    while due and seconds > 0:
        found = [checkpoint_step(path) for path in list_checkpoints(output.dir / "checkpoints")]
        superseded = [each for each in found[: -output.keep_last] if not run.keeps(each)]
        if found and found[-1] >= due and not superseded:
            break
        time.sleep(0.01)
        seconds -= 0.01


def before_step(number: int, act: Callable[[], Any], step: Callable = train_step) -> Callable:
    """Return a training step that first calls `act` where `number` updates are done."""

    def acting(run, *rest, **keywords):
        if run.state.step == number:
            wait_for_checkpoint(run)
            act()
        return step(run, *rest, **keywords)

    return acting


def signal_at(
    number: int, signum: signal.Signals = signal.SIGTERM, step: Callable = train_step
) -> Callable:
    """Return a training step that signals its own process where `number` updates are done."""
    return before_step(number, lambda: os.kill(os.getpid(), signum), step)
