"""Check a checkpoint's tensors and plan against the run that resumes from it.

A file with a checksum that fits can still be another run's, edited, or written by other code.
Nothing in it decides what the config decides: plan and parameter groups come from the config.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_et.checkpoints.contents import is_number, plan_of
from mae_et.checkpoints.state_dicts import describe_mismatch
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError
from mae_et.training.state import TrainState

# Per optimizer, its moments: whether each has the shape of its parameter. None of them depends on
# how the optimizer is computed (fused, foreach).
MOMENTS = {
    "AdamW": {"step": False, "exp_avg": True, "exp_avg_sq": True},
    "Lamb": {"exp_avg": True, "exp_avg_sq": True},
    "Lars": {"momentum_buffer": True},
}
COST_TOLERANCE = 0.01
"""Other versions of PyTorch may count slightly other FLOPs for the same steps."""


def resumed_plan(config: RunConfig, saved: dict[str, Any] | None, planned: Plan) -> Plan:
    """Return the plan of a run: the config's, which that of its checkpoint must equal.

    An extended run (`init.extends`) keeps the stages of the run before, so its steps are the
    checkpoint's.

    Raises:
        UserError: the checkpoint has no plan, or another one.
    """
    if saved is None:
        return planned
    path = Path(saved["path"])
    found = plan_of(saved, path)
    extends = isinstance(config, PretrainConfig) and config.init.extends is not None
    for name, old, new in _compared(found, planned, steps=not extends):
        close = name.endswith("cost") and math.isclose(old, new, rel_tol=COST_TOLERANCE)
        if old != new and not close:
            raise UserError(
                f"{path} is refused: its plan has {name} {old}, and the config gives {new}; give "
                "another output.dir"
            )
    return found if extends else planned


def _compared(one: Plan, other: Plan, steps: bool) -> list[tuple[str, Any, Any]]:
    """Pair what two plans say, by name."""
    names = ("batch_size", "dataset_size", "base", "base_cost")
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names]
    pairs.append(("stages", len(one.stages), len(other.stages)))
    fields = ("bandwidth", "magnitude", "cost", *(("steps",) if steps else ()))
    for number, (here, there) in enumerate(zip(one.stages, other.stages, strict=False), start=1):
        pairs += [(f"for stage {number} {n}", getattr(here, n), getattr(there, n)) for n in fields]
    return pairs


def check_saved_state(saved: dict[str, Any], state: TrainState, plan: Plan) -> None:
    """Check that a checkpoint fits a state that is not sharded yet.

    Raises:
        UserError: names, shapes or types differ, or a number is not finite; the sentence names the
            file and the item.
    """
    problem = (
        _describe_tensors(saved["model"], state.model.state_dict())
        or _describe_average(saved, state)
        or _describe_optimizer(saved["optimizer"], state, saved["step"])
        or _describe_scaler(saved["scaler"])
        or _describe_micro_batch(saved.get("micro_batch"), plan)
    )
    if problem:
        raise UserError(f"{saved['path']} is refused, although its checksum fits: {problem}")


def _describe_tensors(saved: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    if mismatch := describe_mismatch(saved, own):
        return f"its weights are not this model's: {mismatch}"
    for name, tensor in saved.items():
        if tensor.dtype != own[name].dtype:
            return f"its {name} is {tensor.dtype}, not {own[name].dtype}"
        if not bool(tensor.isfinite().all()):
            return f"its {name} is not finite"
    return ""


def _describe_average(saved: dict[str, Any], state: TrainState) -> str:
    if state.ema is None:
        return ""
    if saved["ema"] is None:
        return "it has no moving average of the weights (optim.ema)"
    problem = _describe_tensors(saved["ema"], state.ema.state_dict())
    return problem and f"of the moving average, {problem}"


def _describe_optimizer(saved: dict[str, Any], state: TrainState, step: int) -> str:
    own = state.optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [g["params"] for g in own]:
        return "its optimizer has other parameter groups"
    for group in saved["param_groups"]:
        count = group.get("step", 0)  # timm's LAMB counts in a tensor
        if isinstance(count, Tensor) and count.numel() == 1:
            count = count.item()
        if not (is_number(count) and 0 <= count <= step):
            return f"its optimizer counts {group['step']!r} steps"
    moments = MOMENTS[type(state.optimizer).__name__]
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    numbers = set(saved["state"])
    # There are none before the first update, which the fp16 scaler may have skipped so far.
    may_be_empty = step == 0 or state.scaler.is_enabled()
    if numbers != set(range(len(parameters))) and (numbers or not may_be_empty):
        return "its optimizer has no moments, or those of other parameters"
    for number in numbers:
        shape = list(parameters[number].shape)
        expected = {name: shape if shaped else [] for name, shaped in moments.items()}
        found = {name: list(each.shape) for name, each in saved["state"][number].items()}
        if found != expected:
            return f"its optimizer has moments {found} for parameter {number}, not {expected}"
        for name, tensor in saved["state"][number].items():
            if problem := _describe_moment(name, tensor, parameters[number], step):
                return f"its optimizer's {name} of parameter {number} {problem}"
    return ""


def _describe_moment(name: str, tensor: Tensor, parameter: Tensor, step: int) -> str:
    if tensor.dtype != parameter.dtype:
        return f"is {tensor.dtype}, not {parameter.dtype}"
    if not bool(tensor.isfinite().all()):
        return "is not finite"
    if name in {"step", "exp_avg_sq"} and bool((tensor < 0).any()):
        return "is negative"
    if name == "step" and tensor.item() > step:
        return f"is {tensor.item():g}, beyond the run's step {step}"
    return ""


def _describe_scaler(saved: dict[str, Any]) -> str:
    if not saved:  # not trained in fp16
        return ""
    scale, tracker = saved.get("scale"), saved.get("_growth_tracker")
    if not is_number(scale) or not scale > 0:  # type: ignore[operator]
        return f"its loss scale is {scale!r}"
    if type(tracker) is not int or tracker < 0:
        return f"its loss scaler's growth tracker is {tracker!r}"
    return ""


def _describe_micro_batch(saved: dict[int, int] | None, plan: Plan) -> str:
    if saved is None:
        return ""
    if sorted(saved) != plan.bandwidths:
        return f"its micro-batches are for bandwidths {sorted(saved)}, not {plan.bandwidths}"
    if max(saved.values()) > plan.batch_size:
        return f"its micro-batch of {max(saved.values())} images is larger than a batch"
    return ""
