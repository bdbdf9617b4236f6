"""Training steps that act before an update, for `pretrain(config, step=...)` and `classify`."""

import os
import signal
from collections.abc import Callable
from typing import Any

from mae_et.pretraining import train_step


def before_step(number: int, act: Callable[[], Any], step: Callable = train_step) -> Callable:
    """Return a training step that first calls `act` where `number` updates are done."""

    def acting(run, *rest, **keywords):
        if run.state.step == number:
            act()
        return step(run, *rest, **keywords)

    return acting


def signal_at(
    number: int, signum: signal.Signals = signal.SIGTERM, step: Callable = train_step
) -> Callable:
    """Return a training step that signals its own process where `number` updates are done."""
    return before_step(number, lambda: os.kill(os.getpid(), signum), step)
