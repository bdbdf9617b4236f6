"""What a checkpoint must hold: a checksum proves that a file is whole, not that it is right."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_et.checkpoints.listing import checkpoint_step
from mae_et.checkpoints.state_dicts import has_numbers
from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError


def check_contents(payload: dict[str, Any], path: Path) -> None:
    """Check the types of a checkpoint's entries, and that its step is the one of its name.

    Whether tensors fit the run is checked when it resumes (`training.saved_state`).

    Raises:
        UserError: an entry is missing, or of another type; the sentence names it.
    """
    step = payload.get("step")
    whole = {
        "step": _is_count(step),
        "seconds": is_number(payload.get("seconds")) and payload["seconds"] >= 0,
        "config": isinstance(payload.get("config"), str),
        "plan": isinstance(payload.get("plan"), dict),
        "model": _is_state_dict(payload.get("model")),
        "optimizer": _is_optimizer_state(payload.get("optimizer")),
        "scaler": isinstance(payload.get("scaler"), dict),
        "ema": payload.get("ema") is None or _is_state_dict(payload["ema"]),
        "micro_batch": payload.get("micro_batch") is None or _are_sizes(payload["micro_batch"]),
        "origin": payload.get("origin") is None or _is_origin(payload["origin"]),
    }
    for name, good in whole.items():
        if not good:
            state = "cannot be right" if name in payload else "is missing"
            raise UserError(f"{path} is refused, although its checksum fits: its {name} {state}")
    if path.name.startswith("step-") and checkpoint_step(path) != step:
        raise UserError(f"{path} is refused, although its checksum fits: its step is {step}")


def plan_of(payload: dict[str, Any], path: Path) -> Plan:
    """Return the plan in a checkpoint.

    Raises:
        UserError: it is no plan, or the checkpoint's step lies outside it.
    """
    try:
        plan = Plan.from_dict(payload["plan"])
    except ValueError:
        raise UserError(
            f"{path} is refused, although its checksum fits: its plan cannot be right"
        ) from None
    if payload["step"] > plan.steps:
        raise UserError(
            f"{path} is refused, although its checksum fits: its step {payload['step']} lies "
            f"beyond its plan of {plan.steps} steps"
        )
    return plan


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value)  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and has_numbers(tensor)
        for name, tensor in value.items()
    )


def _is_optimizer_state(value: object) -> bool:
    if not isinstance(value, dict) or not {"state", "param_groups"} <= value.keys():
        return False
    state, groups = value["state"], value["param_groups"]
    return (
        isinstance(state, dict)
        and all(type(number) is int and _is_state_dict(each) for number, each in state.items())
        and isinstance(groups, list)
        and all(isinstance(group, dict) for group in groups)
        and all(isinstance(group.get("params"), list) for group in groups)
    )


def _are_sizes(value: object) -> bool:
    return isinstance(value, dict) and all(
        type(side) is int and type(size) is int and size > 0 for side, size in value.items()
    )


def _is_origin(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    init, sides = value.get("init"), value.get("decode_cpu_sides", ())
    return (
        isinstance(value.get("data", ""), str)
        and _is_count(value.get("processes", 1))
        and value.get("processes", 1) > 0
        and (init is None or isinstance(init, str))
        and value.get("decode", "cpu") in ("cpu", "gpu", "TorchCodec", "torchvision")
        and isinstance(sides, tuple)
        and all(map(_is_count, sides))
    )
