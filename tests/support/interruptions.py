"""Train in another process, record each step, and interrupt it where the test says."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from processes import exit_code
from steps import train_with, wait_for_checkpoint

from finetune import classify
from mae_et import pretrain
from mae_et.config.schema import PretrainConfig
from mae_et.errors import Interrupted
from mae_et.training import loop
from mae_et.training.step import train_step

FORK = multiprocessing.get_context("fork")


# Step, place and signal of each interruption. Checkpoints are at multiples of 5.
ENDS = (
    (3, "step", signal.SIGKILL),  # before any checkpoint
    (8, "step", signal.SIGKILL),  # rows after the checkpoint
    (10, "save", signal.SIGKILL),  # the row is there, its checkpoint is not
    (12, "step", signal.SIGTERM),  # in time to save: a row where no row was due
)


def run_until(config: Any, notes: Path, end: tuple[int, str, signal.Signals] | None) -> None:
    """Train in a process of its own, record each step, and interrupt it at a given place."""
    trains = pretrain if isinstance(config, PretrainConfig) else classify

    def target() -> None:
        torch.set_num_threads(1)
        real_save = loop.save

        def step(run, stage, *rest):
            optimizer = run.state.optimizer.param_groups[0]
            fact = {
                "step": run.state.step,
                "bandwidth": stage.bandwidth,
                "lr": optimizer["lr"] / optimizer.get("lr_scale", 1.0),
                "weight_decay": optimizer["weight_decay"],
            }
            if end is not None and end[1] == "step" and fact["step"] == end[0]:
                wait_for_checkpoint(run)
                os.kill(os.getpid(), end[2])
            loss, norm = train_step(run, stage, *rest)
            with notes.open("a") as file:
                file.write(json.dumps(fact | {"loss": loss.item(), "norm": norm.item()}) + "\n")
            return loss, norm

        def save(checkpoints, *rest, **more):
            if end is not None and end[1] == "save" and checkpoints.run.state.step == end[0]:
                os.kill(os.getpid(), end[2])
            real_save(checkpoints, *rest, **more)

        loop.save = save
        try:
            train_with(step, config, trains)
        except Interrupted:
            os._exit(0)

    process = FORK.Process(target=target)
    process.start()
    code = exit_code(process, 120)
    killed = end is not None and end[2] == signal.SIGKILL
    assert code == (-signal.SIGKILL if killed else 0)
