"""Train a classifier: full fine-tuning, a linear probe, or from scratch under a curriculum.

    config -> network -> plan -> crop(S), normalise, erase -> batch -> device -> mix -> logits
           -> loss -> step -> scores

A frozen encoder makes it a probe; a timm backbone with stages of growing bandwidth makes it
supervised EfficientTrain++. Set-up, session and loop are those of pre-training.

Sources: MAE's fine-tuning (arXiv 2111.06377, appendix A), EfficientTrain++ (arXiv 2405.08768).
"""

import itertools
import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import ClassifierConfig, RecipeConfig
from finetune.datasets import Splits, open_splits
from finetune.training.model import build_classifier, load_run_network
from finetune.training.param_groups import build_optimizer
from finetune.training.periodic_evaluation import PeriodicEvaluation
from finetune.training.plan import make_plan, shown_sides
from finetune.training.preprocessing import preprocessing_of_start
from finetune.training.results import describe, finish
from finetune.training.transforms import LabelledBatch, LabelledTrainDataset, mix
from mae_et.checkpoints.layouts.timm_hub import require_checkpoint
from mae_et.checkpoints.listing import run_of
from mae_et.checkpoints.preprocessing import report_preprocessing
from mae_et.config.typed import typed
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.cache import cache_images
from mae_et.data.sampler import sample_seed
from mae_et.errors import UserError
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.runtime.signals import StopFlag
from mae_et.training.build import build_run
from mae_et.training.opening import Opening
from mae_et.training.periodic import Periodic
from mae_et.training.plan import resumed_plan
from mae_et.training.resume import branch
from mae_et.training.resume.find_checkpoint import find_checkpoint
from mae_et.training.resume.same_data import check_data
from mae_et.training.run import Run
from mae_et.training.session import distributed_session, train_run
from mae_et.training.step import update

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def classify(
    config: ClassifierConfig,
    *,
    step: Callable[..., tuple[Tensor, Tensor]] | None = None,
    opening: Opening[Splits] | None = None,
) -> dict[str, Any]:
    """Train the classifier of a config, resuming from the run folder's newest checkpoint.

    Args:
        config: the run.
        step: one update of the weights, called as `classifier_step`, which is the default.
        opening: the opened data of this config; commands open them before PyTorch is loaded.

    Returns:
        The final figures, which are also in the run folder's `results.json`.

    Raises:
        UserError: the config, the data, the checkpoint or the run folder cannot be used.
        RunFailed: the loss or a gradient became infinite or NaN, images cannot be read, memory ran
            out, or a loader process died.
        Interrupted: a signal requested a stop; the state is saved.
    """
    config = typed(config, ClassifierConfig)
    opening = opening or Opening("classify", config, open_splits)
    with distributed_session(config, config.efficiency) as (world, stopped):
        _classify(config, world, stopped, step or classifier_step, opening)
    return json.loads((config.output.dir / "results.json").read_text(encoding="utf-8"))


def _classify(
    config: ClassifierConfig,
    world: DistributedContext,
    stopped: StopFlag,
    step: Callable[..., tuple[Tensor, Tensor]],
    opening: Opening[Splits],
) -> None:
    saved, finished = find_checkpoint(config, world)
    if finished:
        return
    with fail_together(world):
        train, val = opening.data
    saved, files = branch.start(config, saved, train, world)
    provenance = check_data(config, saved, train, world)
    ranks = saved["origin"].get("processes", world.size) if saved else world.size
    if world.is_main and ranks != world.size:
        warnings.warn(
            "this run resumes on another number of ranks: the samples stay the same, but each rank "
            "draws its own mixing and drop path and has its own batch-norm statistics",
            stacklevel=1,
        )
    images = cache_images(train, config, world)
    torch.manual_seed(config.seed)
    with fail_together(world):
        network = build_network(config, saved, len(train.classes))
    plan = resumed_plan(config, saved, make_plan(config, network, len(train)))
    run = build(config, network, plan, world, saved)
    run.provenance, run.stopped = provenance, stopped
    del saved  # the run holds its tensors
    opening.say_built(run)
    shown = shown_sides(config.model.image_size, network)
    dataset = LabelledTrainDataset(
        images, config.data, config.recipe, plan, config.seed, config.model.image_size,
        config.crop.method, [shown(stage.bandwidth) for stage in plan.stages],
    )  # fmt: skip
    step = partial(step, recipe=config.recipe, classes=len(train.classes))
    files |= {"classes.json": describe(run, train.classes)}
    periodic: list[Periodic] = []
    if val is not None and config.output.evaluate_every is not None:
        periodic.append(PeriodicEvaluation(run, config.output.evaluate_every, val))
    train_run(run, dataset, step, periodic, partial(finish, run), files)


def build_network(
    config: ClassifierConfig, saved: dict[str, Any] | None, classes: int
) -> nn.Module:
    """Build a new network, or a checkpoint's, whose initial weights may be gone."""
    if saved is None:
        start = config.model.checkpoint
        if start is not None:
            require_checkpoint(start)
        if start is not None or config.model.pretrained:
            recorded = preprocessing_of_start(config.model)
            report_preprocessing(recorded, config.data, start or config.model.backbone)
        return build_classifier(config.model, classes)
    return load_run_network(config.model, run_of(Path(saved["path"])), saved["model"])


def build(
    config: ClassifierConfig,
    network: Any,
    plan: Plan,
    world: DistributedContext,
    saved: dict[str, Any] | None,
) -> Run:
    """Build the run of a network, new or restored from a checkpoint."""
    efficiency = config.efficiency
    if efficiency.sharding != "none":
        raise UserError("efficiency.sharding is for pre-training; classifiers fit without")
    mixes = bool(config.recipe.mixup or config.recipe.cutmix)
    normalises = any(isinstance(part, BATCH_NORMS) for part in network.modules())
    if efficiency.gradient_checkpointing:
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise UserError(
                "efficiency.gradient_checkpointing: this network does not support it"
            ) from error
    run = build_run(
        config,
        plan,
        world,
        network,
        partial(build_optimizer, config=config.optim),
        dry_pass,
        saved,
        ema_decay=config.optim.ema,
        multiple=2 if mixes or normalises else 1,
    )
    sizes = [run.micro_batch[stage.bandwidth] for stage in plan.stages]
    if mixes and any(size % 2 for size in sizes):
        raise UserError("recipe.mixup and recipe.cutmix need micro-batches of even size")
    if normalises and min(sizes) == 1:
        raise UserError("batch norm needs micro-batches of at least two images")
    return run


def dry_pass(run: Run, stage: PlannedStage, count: int) -> None:
    """Run a forward and backward pass on `count` black images at a stage."""
    model, device = run.config.model, run.world.device
    sides = shown_sides(model.image_size, run.network)(stage.bandwidth)
    images = torch.zeros(count, model.channels, *sides, device=device)
    with autocast(run.dtype, device):
        logits = run.network(images)
    F.cross_entropy(logits.float(), torch.zeros(count, dtype=torch.int64, device=device)).backward()


def classifier_step(
    run: Run,
    stage: PlannedStage,
    batches: Iterable[LabelledBatch],
    recipe: RecipeConfig,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Update a classifier once; return the loss and the gradient's norm.

    Drop path and mixing draw from (seed, step, rank, micro-batch), so a resumed run draws the same
    numbers as an uninterrupted one.
    """
    device = run.world.device
    key = (run.config.seed, run.state.step, run.world.rank)
    torch.manual_seed(sample_seed(*key))
    numbers = itertools.count()

    def loss_of(batch: LabelledBatch) -> Tensor:
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        seed = sample_seed(*key, next(numbers))
        images, targets = mix(images, labels, recipe, classes, seed)
        with autocast(run.dtype, device):
            logits = run.network(images)
        return F.cross_entropy(logits.float(), targets)

    return update(run, stage, batches, loss_of)
