"""The state of a run: weights, optimizer, loss scaler, step."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from mae_et.training.efficiency.fsdp import (
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
)


@dataclass
class TrainState:
    """Everything that changes while training; the rest is a function of config and step.

    Attributes:
        model: the model, neither compiled nor wrapped.
        optimizer: its optimizer.
        scaler: loss scaler; disabled unless training in fp16.
        step: updates done.
        seconds: training time so far, without pauses.
        ema: moving average of the model, if the run keeps one.
        micro_batch: fitted images per forward pass at each bandwidth, kept so that a resumed run
            sums gradients in the same parts; None if not fitted.
        sharded: whether model and optimizer are sharded over ranks; checkpoints hold full tensors.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0
    ema: ModelEmaV3 | None = None
    micro_batch: dict[int, int] | None = None
    sharded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain types.

        A sharded state is gathered: every rank must call this, and only the main rank gets all of
        it.
        """
        if self.sharded:
            model = full_state_dict(self.model)
            optimizer = full_optimizer_state_dict(self.model, self.optimizer)
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "micro_batch": self.micro_batch,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Load the state returned by `to_dict`; parameter groups stay as configured.

        If sharded, only rank 0 needs the optimizer's tensors (`optimizer_on_main`).
        """
        optimizer = _with_own_groups(saved["optimizer"], self.optimizer.state_dict())
        if self.sharded:
            load_full_state_dict(self.model, saved["model"])
            on_main = bool(saved.get("optimizer_on_main"))
            load_full_optimizer_state_dict(self.model, self.optimizer, optimizer, on_main)
        else:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(optimizer)
        if saved["scaler"]:  # empty unless trained in fp16; a disabled scaler ignores it
            found = {key: saved["scaler"][key] for key in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict(self.scaler.state_dict() | found)
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        self.step, self.seconds = saved["step"], saved["seconds"]


def _with_own_groups(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state with its current parameter groups.

    Only the number of steps, which timm's Lamb counts per group, is the checkpoint's.
    """
    groups = [
        new | ({"step": old["step"]} if "step" in old else {})
        for old, new in zip(saved["param_groups"], own["param_groups"], strict=True)
    ]
    return {"state": saved["state"], "param_groups": groups}
