"""Training steps that act before an update, and runs that take them."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from mae_et import pretrain
from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.training import loop
from mae_et.training.step import train_step


def train_with(step: Callable, config: Any, trains: Callable = pretrain, **more: Any) -> Any:
    """Train a config with another function in place of `train_step`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        return trains(config, **more)


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


def before_step(number: int, act: Callable[[], Any]) -> Callable:
    """Return a training step that first calls `act` where `number` updates are done."""

    def acting(run, *rest):
        if run.state.step == number:
            wait_for_checkpoint(run)
            act()
        return train_step(run, *rest)

    return acting


def signal_at(number: int, signum: signal.Signals = signal.SIGTERM) -> Callable:
    """Return a training step that signals its own process where `number` updates are done."""
    return before_step(number, lambda: os.kill(os.getpid(), signum))
