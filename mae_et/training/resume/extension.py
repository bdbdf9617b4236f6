"""Extend a run to a larger budget, from its last checkpoint before the learning rate decays.

    RUN:      warm-up | constant ................ | decay
                                  kept checkpoint ^
    extended: the same steps .................... | constant ................ | decay

Source: warm-up, stable, decay (Hägele et al., arXiv 2405.18392).
"""

import math
from bisect import bisect_left
from pathlib import Path
from typing import Any

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.checkpoints.run_config import config_of_run
from mae_et.checkpoints.store import last_that_loads
from mae_et.config.files import numeric_keys
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.bad_images import RECORD
from mae_et.data.datasets import ImageDataset
from mae_et.data.fingerprint import fingerprint
from mae_et.errors import UserError
from mae_et.io.metrics_file import METRICS, SCORES, read_metrics, row_line
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.optim import decay_start, lr_at
from mae_et.training.plan import plan_new_run, plan_of_run
from mae_et.training.resume.extendable import check_extendable
from mae_et.training.resume.find_checkpoint import share_checkpoint
from mae_et.training.resume.same_run import MAY_CHANGE, check_same_settings

RECORDS = (METRICS, SCORES, RECORD)

# What an extension may change: its budget, and how its learning rate falls after the branch.
_MAY_DIFFER = MAY_CHANGE | {
    "curriculum.epochs", "init.extends", "optim.warmup_fraction", "optim.decay_fraction",
    "optim.min_lr", "data.root",
}  # fmt: skip


def start(
    config: PretrainConfig,
    saved: dict[str, Any] | None,
    source: ImageDataset,
    world: DistributedContext,
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return the checkpoint to start from: `saved`, or that of the run that a new run extends.

    Only the main rank reads the run to extend, and returns files for the run folder too.
    """
    if saved is not None or config.init.extends is None:
        return saved, {}
    files: dict[str, str] = {}
    with fail_together(world):
        if world.is_main:
            saved, files = read_extension(config, config.init.extends, source)
    return share_checkpoint(saved, world), files


def read_extension(
    config: PretrainConfig, run: Path, source: ImageDataset
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the run to extend, and report the checkpoint and learning rate to start from.

    Returns:
        The checkpoint to start from, with the longer plan, and the run's records as files for the
        new run folder, which drops rows after that checkpoint as every resumed run does.
    """
    before = config_of_run(run)
    if before is None:
        raise UserError(f"init.extends {run} is not a run folder of mae-et pretrain")
    check_extendable(run, before, config.curriculum.epochs)
    check_same_settings(
        f"init.extends {run} is a run of other settings",
        numeric_keys(before),
        numeric_keys(config),
        _MAY_DIFFER,
    )
    saved = _last_constant_checkpoint(run, before, plan_of_run(run))
    if saved["origin"].get("data") != fingerprint(source):
        raise UserError(
            f"init.extends {run} was trained on other images (their number, names, labels or order)"
        )
    extended = plan_new_run(config, len(source))
    _check_continuous(config, extended, saved["step"])
    say(_describe(config, extended, saved))
    files = {name: _record(run, name, extended) for name in RECORDS}
    return saved | {"plan": extended.to_dict()}, {n: text for n, text in files.items() if text}


def _last_constant_checkpoint(run: Path, config: PretrainConfig, plan: Plan) -> dict[str, Any]:
    """Read a run's last checkpoint from the constant part of its learning rate."""
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
    """Return a record with the `compute` of its rows under a longer plan."""
    rows = read_metrics(run, name)
    for row in rows:
        if "compute" in row:
            row["compute"] = plan.progress(row["step"])
    return "".join(row_line(row, name) for row in rows)


def _check_continuous(config: PretrainConfig, plan: Plan, step: int) -> None:
    """Refuse an extension whose learning rate would jump at its first step."""
    optim, run = config.optim, config.init.extends
    lr = lr_at(plan.progress(step), optim)
    if not math.isclose(lr, optim.lr):
        raise UserError(
            f"init.extends {run}: the learning rate would jump from {optim.lr:.3g} to {lr:.3g} at "
            f"step {step}: optim.warmup_fraction must end, and optim.decay_fraction begin, so "
            f"that it is constant at {plan.progress(step):.0%} of the longer run"
        )


def _describe(config: PretrainConfig, plan: Plan, saved: dict[str, Any]) -> str:
    """Describe the checkpoint that an extension starts from, and its learning rate from there."""
    optim, step = config.optim, saved["step"]
    return (
        f"extending {saved['path']} (step {step} of {plan.steps}): bandwidth "
        f"{plan.at(step).bandwidth}, learning rate {optim.lr:.3g} to step "
        f"{decay_start(plan, optim)}, then falling to {optim.min_lr:.3g}"
    )
