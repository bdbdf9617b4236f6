"""Resolve a config and a dataset's size to a run's plan, and its batches to micro-batches."""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from mae_et.checkpoints.listing import run_of
from mae_et.config.model import ModelConfig, visible_patches
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.curriculum.mae_cost import mae_training_flops
from mae_et.curriculum.plan import Plan, read_plan
from mae_et.curriculum.schedule import Curriculum
from mae_et.errors import UserError

COST_TOLERANCE = 0.01
"""Relative tolerance, as versions of PyTorch may count slightly different FLOPs."""


def curriculum_of(config: PretrainConfig) -> Curriculum:
    """Return a config's curriculum, checked against the mask ratio at its smallest bandwidth."""
    model = config.model
    curriculum = Curriculum.from_config(config.curriculum, model.image_size, model.patch)
    smallest = min(stage.bandwidth for stage in curriculum.stages)
    try:
        visible_patches((smallest // model.patch) ** 2, model.mask_ratio)
    except ValueError as error:
        raise UserError(f"model.mask_ratio at bandwidth {smallest}: {error}") from None
    return curriculum


def plan_of_run(folder: Path) -> Plan:
    """Return the plan of a run folder; refuse a folder without one, or with a damaged one."""
    path = folder / "plan.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder of mae-et pretrain: it has no plan.json")
    return read_plan(path)


def plan_new_run(config: PretrainConfig, dataset_size: int) -> Plan:
    """Return the plan of a new run, from its config or, if it continues one, from that."""
    if config.continues is None:
        return make_plan(config, dataset_size)
    return continued_plan(config, plan_of_run(run_of(config.continues)))


def continued_plan(config: RunConfig, before: Plan) -> Plan:
    """Return the plan of a run with the budget of one that continues it (`config.continues`)."""
    curriculum = Curriculum.from_config(config.curriculum, before.base, patch=1)
    return curriculum.with_budget(before, config.curriculum.epochs)


def make_plan(
    config: PretrainConfig,
    dataset_size: int,
    curriculum: Curriculum | None = None,
    stretch: bool = False,
) -> Plan:
    """Resolve a config's curriculum for a dataset, ignoring `continues`."""
    curriculum = curriculum or curriculum_of(config)
    batch, data = config.optim.batch_size, config.data
    synthetic = data.source == "synthetic" and data.name is None
    if batch > dataset_size == data.synthetic_train and synthetic:
        raise UserError(
            f"optim.batch_size {batch} is larger than the dataset of {dataset_size} images (the "
            "synthetic one, because neither data.root nor data.name is given)"
        )
    cost = image_cost(config.model) if config.curriculum.cost == "flops" else None
    return curriculum.plan(config.curriculum.epochs, dataset_size, batch, cost, stretch)


def resumed_plan(config: RunConfig, saved: dict[str, Any] | None, planned: Plan) -> Plan:
    """Return the plan of a run: that of its config, which must equal its checkpoint's.

    A run that continues another one (`config.continues`) keeps its stages, so the steps are taken
    from the checkpoint.
    """
    if saved is None:
        return planned
    found = Plan.from_dict(saved["plan"])
    continues = config.continues is not None
    for name, old, new in _compared(found, planned, steps=not continues):
        close = "cost" in name and math.isclose(old, new, rel_tol=COST_TOLERANCE)
        if old != new and not close:
            raise UserError(
                f"the plan of {saved['path']} has {name} {old}, that of the config {new}; give "
                "another output.dir"
            )
    return found if continues else planned


def _compared(one: Plan, other: Plan, steps: bool) -> list[tuple[str, Any, Any]]:
    """Pair the values of two plans, by name."""
    names = ("batch_size", "dataset_size", "base", "base_cost")
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names]
    pairs.append(("stages", len(one.stages), len(other.stages)))
    fields = ("bandwidth", "magnitude", "cost", *(("steps",) if steps else ()))
    for number, (here, there) in enumerate(zip(one.stages, other.stages, strict=False), start=1):
        pairs += [(f"{n} of stage {number}:", getattr(here, n), getattr(there, n)) for n in fields]
    return pairs


@cache
def image_cost(config: ModelConfig) -> Callable[[int], float]:
    """Return a function from a bandwidth to the FLOPs of one image's training step.

    Cached, because a search plans many runs of one model.
    """
    if known := mae_training_flops(config):
        return known
    # Imported here, because runs are planned before PyTorch is loaded.
    import torch

    from mae_et.curriculum.flops import training_flops
    from mae_et.models.mae import MaskedAutoencoder

    with torch.device("meta"):
        model = MaskedAutoencoder.from_config(config)
    # The budget counts MAE's decoder as published, predicting every patch: skipping patches outside
    # the loss saves time and must not lengthen the run. A decoder share is a user's choice.
    published = config.decoder_attention == "self" and config.decoder_share == 1
    forward = partial(model, every_patch=published)
    return training_flops(forward, config.channels)


def micro_batch_size(
    requested: int | dict[int, int] | Literal["auto"] | None, plan: Plan, world: int
) -> dict[int, int]:
    """Return the images of one forward pass of one rank, by bandwidth.

    Each divides a rank's share of the batch and is at most the requested one
    (`EfficiencyConfig.micro_batch`). With `auto` it is the whole share until fitted.

    Raises:
        UserError: the batch is not divisible by the number of ranks, or the bandwidths in
            `requested` are not the curriculum's.
    """
    if plan.batch_size % world:
        raise UserError(f"optim.batch_size {plan.batch_size} is not divisible by {world} ranks")
    share = plan.batch_size // world
    limits = dict.fromkeys(plan.bandwidths, share)
    if isinstance(requested, int):
        limits = {b: requested * plan.base**2 // b**2 for b in plan.bandwidths}
    elif isinstance(requested, dict):
        limits = requested
    if sorted(limits) != plan.bandwidths:
        raise UserError(
            f"efficiency.micro_batch names the bandwidths {sorted(limits)}, the curriculum has "
            f"{plan.bandwidths}"
        )
    divisors = [part for part in range(1, share + 1) if share % part == 0]
    return {b: divisors[bisect_right(divisors, limit) - 1] for b, limit in limits.items()}
