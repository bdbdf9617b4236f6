"""Train a classifier: full fine-tuning, a probe, or from scratch under a curriculum.

One spine for all of them, as in pre-training: config -> plan -> network -> loop -> scores. A frozen
encoder is a probe; a backbone with stages of growing bandwidth is supervised EfficientTrain++.

Sources: MAE's fine-tuning (arXiv 2111.06377, appendix A), EfficientTrain++ (arXiv 2405.08768).
"""

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from finetune.config import ClassifierConfig
from finetune.cost import image_cost
from finetune.datasets import LabelledSplits, open_splits
from finetune.image_size import (
    format_size,
    height_and_width,
    shorter_side,
    size_at_bandwidth,
)
from finetune.model import build_classifier, check_sizes, load_run_network, size_multiple
from finetune.param_groups import build_optimizer
from finetune.results import describe, evaluate_and_save_best, finish
from finetune.transforms import LabelledBatch, LabelledTrainDataset, mix
from mae_et.config.schema import duration_in_steps
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.curriculum.schedule import Curriculum, Plan, PlannedStage
from mae_et.data.loader import training_batches
from mae_et.data.sampler import micro_batch_size, sample_seed
from mae_et.errors import UserError
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast, set_precision
from mae_et.runtime.signals import StopFlag
from mae_et.training.loop import save, steps
from mae_et.training.micro_batch import fit_micro_batch
from mae_et.training.resume import check_same_data, provenance_of, same_world_size
from mae_et.training.run import Run, TrainState, wrap
from mae_et.training.session import distributed_session, find_checkpoint, run_records
from mae_et.training.step import update

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def classify(config: ClassifierConfig) -> dict[str, Any]:
    """Train a classifier as a config says, going on from the run folder's newest checkpoint.

    Returns:
        The final figures, which are also in the run folder's `results.json`.

    Raises:
        UserError: the config, the data, the checkpoint or the run folder cannot be used.
        RunFailed: the loss or a gradient became infinite or NaN, images cannot be read, memory ran
            out, or a loader process died.
        Interrupted: a signal asked to stop; the state is saved.
    """
    with distributed_session(config.efficiency) as (world, stopped):
        _classify(config, world, stopped)
    return json.loads((config.output.dir / "results.json").read_text(encoding="utf-8"))


def _classify(config: ClassifierConfig, world: DistributedContext, stopped: StopFlag) -> None:
    saved, finished = find_checkpoint(config, world)
    if finished:
        return
    data = open_splits(config)
    origin = provenance_of(data.train, world)
    check_same_data(config, saved, len(data.train), origin)
    if saved and world.is_main and not same_world_size(saved, world):
        warnings.warn(
            "this run goes on with another number of processes: the samples stay the same, but "
            "where there are mixing, drop path or batch norms, each process has its own",
            stacklevel=1,
        )
    torch.manual_seed(config.seed)
    network = build_network(config, saved, data.classes)
    plan = Plan.from_dict(saved["plan"]) if saved else make_plan(config, network, len(data.train))
    shown = shown_sides(config, network)
    sizes = {height_and_width(config.model.image_size)} | {shown(s.bandwidth) for s in plan.stages}
    check_sizes(network, sizes, config.model.channels)
    run = prepare(config, network, plan, world, saved)
    run.origin = origin
    del saved
    view = LabelledTrainDataset(
        data.train, config.data, config.recipe, plan, config.seed, config.model.image_size,
        config.crop.method,
    )  # fmt: skip
    about = {"classes.json": describe(run, data)}
    with training_batches(run, view) as loaded, run_records(run, about) as monitor:
        train(run, loaded, data, monitor, stopped)
        finish(run, monitor)
    distributed.barrier(world)


def build_network(
    config: ClassifierConfig, saved: dict[str, Any] | None, classes: int
) -> nn.Module:
    """Build the network anew, or as a saved run had it: what it started from may be gone."""
    if saved is None:
        return build_classifier(config.model, classes)
    return load_run_network(config.model, config.output.dir, saved["model"])


def make_plan(config: ClassifierConfig, network: nn.Module, images: int) -> Plan:
    """Resolve the curriculum.

    Raises:
        UserError: the curriculum, the batch and the data do not fit each other.
    """
    size, channels = config.model.image_size, config.model.channels
    patch = size_multiple(network, size)
    if any(side % patch for side in height_and_width(size)):
        raise UserError(
            f"model.image_size {format_size(size)} is not a multiple of the patch size {patch}"
        )
    curriculum = Curriculum.from_config(config.curriculum, shorter_side(size), patch)
    counts = config.curriculum.cost == "flops"
    dry = copy.deepcopy(network).to("meta").eval() if counts else None
    cost = image_cost(size, patch, dry, channels)
    return curriculum.plan(config.curriculum.epochs, images, config.optim.batch_size, cost)


def shown_sides(config: ClassifierConfig, network: nn.Module) -> Callable[[int], tuple[int, int]]:
    """Return a function from a bandwidth to height and width of what the network is shown."""
    size = config.model.image_size
    return partial(size_at_bandwidth, size, patch=size_multiple(network, size))


def prepare(
    config: ClassifierConfig,
    network: Any,
    plan: Plan,
    world: DistributedContext,
    saved: dict[str, Any] | None,
) -> Run:
    """Put a network on its device, with its optimizer, as new or as saved."""
    efficiency = config.efficiency
    if efficiency.sharding != "none":
        raise UserError("efficiency.sharding is of pre-training; classifiers fit without")
    micro_batch = micro_batch_size(efficiency.micro_batch, plan, world.size)
    mixes = bool(config.recipe.mixup or config.recipe.cutmix)
    if mixes and any(micro_batch(stage.bandwidth) % 2 for stage in plan.stages):
        raise UserError("recipe.mixup and recipe.cutmix need micro-batches of even size")
    smallest = min(micro_batch(stage.bandwidth) for stage in plan.stages)
    normalises = any(isinstance(part, BATCH_NORMS) for part in network.modules())
    if smallest == 1 and normalises:
        raise UserError("the network normalises over its batch, so micro-batches need two images")
    if efficiency.gradient_checkpointing:
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise UserError("efficiency.gradient_checkpointing: the network has none") from None
    network = network.to(world.device)
    dtype, scaler = set_precision(efficiency, world.device)
    decay = config.optim.ema
    ema = None if decay is None else ModelEmaV3(network, decay=decay)
    state = TrainState(network, build_optimizer(network, config.optim), scaler, ema=ema)
    if saved:
        state.restore(saved)
    run = Run(config, plan, world, state, network, dtype, micro_batch)
    if efficiency.micro_batch == "auto":
        attempt = partial(pass_on_zeros, run)
        fit_micro_batch(run, saved, attempt, multiple=2 if mixes or normalises else 1)
    run.network = wrap(network, efficiency, plan, world, run.micro_batch)
    return run


def pass_on_zeros(run: Run, stage: PlannedStage, count: int) -> None:
    """Go forward and backward through the network, on as many black images as are asked for."""
    model, device = run.config.model, run.world.device
    sides = shown_sides(run.config, run.network)(stage.bandwidth)
    images = torch.zeros(count, model.channels, *sides, device=device)
    with autocast(run.dtype, device):
        logits = run.network(images)
    F.cross_entropy(logits.float(), torch.zeros(count, dtype=torch.int64, device=device)).backward()


def train(
    run: Run,
    batches: Iterator[LabelledBatch],
    data: LabelledSplits,
    monitor: RunLogger | None,
    stopped: StopFlag,
) -> None:
    """Train to the end and score on the way; only the main process has a monitor, and writes."""
    output, state = run.config.output, run.state
    every = math.inf
    if output.evaluate_every is not None:
        every = duration_in_steps(output.evaluate_every, run.plan.steps)
    evaluates = math.isfinite(every)
    if evaluates and state.step and (state.step % every == 0 or state.step == run.plan.steps):
        # Stopped between a checkpoint and the scores that were due with it.
        scored = {row["step"] for row in read_metrics(output.dir, SCORES)}
        if not distributed.any_rank(state.step in scored, run.world):
            evaluate_and_save_best(run, data, monitor)
    state.model.train()
    shown = shown_sides(run.config, state.model)
    step = partial(classifier_step, classes=data.classes, shown=shown)
    for moment in steps(run, batches, step, stopped):
        if monitor is not None:
            monitor.advance(state.step)
            if moment.row is not None:
                monitor.log(moment.row)
        if moment.saving:
            save(run, monitor)
        due = state.step % every == 0 or moment.last
        if evaluates and due and not moment.stopping:
            evaluate_and_save_best(run, data, monitor)


def classifier_step(
    run: Run,
    stage: PlannedStage,
    batches: Iterable[LabelledBatch],
    classes: int,
    shown: Callable[[int], tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Update a classifier once; return the loss and the gradient's norm.

    Drop path and mixing draw from (seed, step, process, micro-batch), so that a run that goes on
    draws what it would have drawn.
    """
    config, device = run.config, run.world.device
    key = (config.seed, run.state.step, run.world.rank)
    torch.manual_seed(sample_seed(*key))
    numbers = itertools.count()

    def loss_of(batch: LabelledBatch) -> Tensor:
        images, labels = (part.to(device, non_blocking=True) for part in batch[:2])
        images, targets = mix(
            LabelledBatch(images, labels), config.recipe, classes, sample_seed(*key, next(numbers))
        )
        images = low_frequency_crop(images, shown(stage.bandwidth), config.crop.method)
        with autocast(run.dtype, device):
            logits = run.network(images)
        return F.cross_entropy(logits.float(), targets)

    result = update(run, stage, batches, loss_of)
    ema: Any = run.state.ema
    if ema is not None:
        ema.update(run.state.model, run.state.step)
    return result
