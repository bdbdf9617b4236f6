"""Continue a checkpoint of another run in a new folder: with other settings or a larger budget.

    RUN:      warm-up | constant ................ | decay
                         checkpoint ^               ^
    branch:   the same steps .......| the same plan, with other values of optim, or another seed
    extended: the same steps .......................| constant ................ | decay

Source of extended runs: warm-up, stable, decay (Hägele et al., arXiv 2405.18392).
"""

import math
from bisect import bisect_left
from functools import partial
from pathlib import Path
from typing import Any

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints, run_of
from mae_et.checkpoints.run_config import recorded_config
from mae_et.checkpoints.store import last_that_loads, load_checkpoint
from mae_et.config.files import numeric_keys
from mae_et.config.keys import Mark, marked_keys
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.bad_images import RECORD
from mae_et.data.datasets import ImageDataset
from mae_et.data.fingerprint import fingerprint
from mae_et.errors import UserError
from mae_et.io.metrics_file import METRICS, SCORES, read_metrics, row_line
from mae_et.io.plain_files import read_text
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.optim import decay_start, lr_at
from mae_et.training.plan import continued_plan, plan_of_run
from mae_et.training.resume.extendable import check_extendable
from mae_et.training.resume.find_checkpoint import share_checkpoint
from mae_et.training.resume.same_run import check_same_settings

RECORDS = (METRICS, SCORES, RECORD)

# Why other keys stay, by the start of their name.
_REASONS = {
    "optim.batch_size": "the place in the data is counted in its steps",
    "optim.": "the optimizer's state belongs to it",
    "curriculum.": "the steps so far belong to that curriculum",
    "data.": "the place in the data belongs to those views of those images",
}


def start(
    config: RunConfig,
    saved: dict[str, Any] | None,
    source: ImageDataset,
    world: DistributedContext,
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return the checkpoint to start from: `saved`, or that of the run that a new run continues.

    Only the main rank reads the run to continue, and returns files for the run folder too.
    """
    if saved is not None or config.continues is None:
        return saved, {}
    files: dict[str, str] = {}
    with fail_together(world):
        if world.is_main:
            saved, files = read_parent(config, config.continues, source)
    return share_checkpoint(saved, world), files


def read_parent(
    config: RunConfig, path: Path, source: ImageDataset
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the run to continue, and report the checkpoint, the changes and the learning rate.

    Returns:
        The checkpoint to start from, with the plan of the new run and, as `origin.parent`, where it
        comes from; and the run's records as files for the new run folder, which drops rows after
        that checkpoint as every resumed run does.
    """
    run = run_of(path)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{_name(config)} is not a run folder, or a checkpoint in one")
    refusal = "holds a run of another command, or of another version of mae-et"
    before = recorded_config(read_text(run / "config.yaml"), type(config), run, refusal)
    changes = _changes(config, before)
    if isinstance(before, PretrainConfig) and config.branch_from is None:
        check_extendable(run, before, config.curriculum.epochs)
        saved = _last_constant_checkpoint(run, before)
    else:
        saved = _checkpoint(path)
    if saved["origin"].get("data") != fingerprint(source):
        raise UserError(
            f"{_name(config)} was trained on other images (their number, names, labels or order)"
        )
    old, step = Plan.from_dict(saved["plan"]), saved["step"]
    plan = continued_plan(config, old) if "curriculum.epochs" in changes else old
    if plan.steps <= step:
        raise UserError(
            f"{_name(config)}: the plan ends at step {plan.steps:,}, and the checkpoint is of step "
            f"{step:,}: give a larger curriculum.epochs, or an earlier checkpoint"
        )
    if config.branch_from is None:
        _check_continuous(config, plan, step)
        say(_describe_extension(config, plan, saved))
    else:
        say(_describe(saved, changes, _lr(before, old, step), _lr(config, plan, step)))
    parent = {"checkpoint": saved["path"], "step": step, "changes": changes}
    parent["parent"] = saved["origin"].get("parent")
    files = {name: _record(run, name, plan) for name in RECORDS}
    saved |= {"plan": plan.to_dict(), "origin": saved["origin"] | {"parent": parent}}
    return saved, {name: text for name, text in files.items() if text}


def _name(config: RunConfig) -> str:
    """Name the key, and the path, of the run to continue."""
    return f"{'init.extends' if config.branch_from is None else 'branch_from'} {config.continues}"


def _changes(config: RunConfig, before: RunConfig) -> dict[str, list[Any]]:
    """Return the old and the new value of each changed key; refuse what cannot change."""
    old, new = numeric_keys(before), numeric_keys(config)
    kind = type(config)
    change: Mark = "extend" if config.branch_from is None else "branch"
    may_differ = marked_keys(kind, "resume", "origin", change)
    check_same_settings(_name(config), old, new, may_differ, partial(_advise, config))
    kept = old.keys() - marked_keys(kind, "origin")
    return {key: [old[key], new[key]] for key in old if key in kept and old[key] != new[key]}


def _advise(config: RunConfig, key: str) -> str:
    """Say why a key cannot change, and what to do."""
    if key in marked_keys(type(config), "branch"):  # but not when extending
        return f"give the earlier value, or change it with --branch-from {config.continues}"
    reasons = (reason for start, reason in _REASONS.items() if key.startswith(start))
    reason = next(reasons, "the weights so far were trained with it")
    return f"it cannot change, because {reason}: give the earlier value, or start a new run"


def _checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a run's newest."""
    run = run_of(path)
    paths = list_checkpoints(run / "checkpoints")
    if path != run:
        if not path.is_file():
            steps = ", ".join(str(checkpoint_step(found)) for found in paths)
            raise UserError(f"there is no checkpoint {path}; those of {run} are of steps {steps}")
        try:
            return load_checkpoint(path)
        except ValueError as error:
            raise UserError(str(error)) from None
    saved = last_that_loads(paths)
    if saved is None:
        raise UserError(f"branch_from {run} has no checkpoint that loads")
    return saved


def _last_constant_checkpoint(run: Path, config: PretrainConfig) -> dict[str, Any]:
    """Read a run's last checkpoint from the constant part of its learning rate."""
    plan = plan_of_run(run)
    last = decay_start(plan, config.optim)
    assert last is not None  # `check_extendable`
    first = bisect_left(range(last), config.optim.warmup_fraction, key=plan.progress)
    paths = list_checkpoints(run / "checkpoints")
    saved = last_that_loads([path for path in paths if first <= checkpoint_step(path) <= last])
    if saved is None:
        raise UserError(
            f"init.extends {run} has no checkpoint of its constant learning rate (steps {first} to "
            f"{last}) that loads; the one of step {last} is kept unless it is deleted"
        )
    return saved


def _record(run: Path, name: str, plan: Plan) -> str:
    """Return a record with the `compute` of its rows under a plan of another budget."""
    rows = read_metrics(run, name)
    for row in rows:
        if "compute" in row:
            row["compute"] = plan.progress(row["step"])
    return "".join(row_line(row, name) for row in rows)


def _check_continuous(config: RunConfig, plan: Plan, step: int) -> None:
    """Refuse an extension whose learning rate would jump at its first step."""
    lr = _lr(config, plan, step)
    if not math.isclose(lr, config.optim.lr):
        raise UserError(
            f"{_name(config)}: the learning rate would jump from {config.optim.lr:.3g} to {lr:.3g} "
            f"at step {step}: optim.warmup_fraction must end, and optim.decay_fraction begin, so "
            f"that it is constant at {plan.progress(step):.0%} of the longer run"
        )


def _lr(config: RunConfig, plan: Plan, step: int) -> float:
    return lr_at(plan.progress(step), config.optim)


def _describe(saved: dict[str, Any], changes: dict[str, list[Any]], *lr: float) -> str:
    """Describe the checkpoint that a run branches from, and what changes there."""
    steps = Plan.from_dict(saved["plan"]).steps
    texts = [f"{key} {old} -> {new}" for key, (old, new) in changes.items()]
    texts.append(f"learning rate {' -> '.join(dict.fromkeys(f'{each:.3g}' for each in lr))}")
    return (
        f"branches from {saved['path']} (step {saved['step']:,} of {steps:,}); {'; '.join(texts)}"
    )


def _describe_extension(config: RunConfig, plan: Plan, saved: dict[str, Any]) -> str:
    """Describe the checkpoint that an extension starts from, and its learning rate from there."""
    optim, step = config.optim, saved["step"]
    return (
        f"extending {saved['path']} (step {step} of {plan.steps}): bandwidth "
        f"{plan.at(step).bandwidth}, learning rate {optim.lr:.3g} to step "
        f"{decay_start(plan, optim)}, then falling to {optim.min_lr:.3g}"
    )
