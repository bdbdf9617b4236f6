"""Train a classifier: full fine-tuning, a probe, or from scratch under a curriculum.

One spine for all of them, as in pre-training: config -> plan -> network -> loop -> scores. A frozen
encoder is a probe; a backbone with stages of growing bandwidth is supervised EfficientTrain++.

Sources: MAE's fine-tuning (arXiv 2111.06377, appendix A), EfficientTrain++ (arXiv 2405.08768).
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from finetune.config import ClassifierConfig
from finetune.evaluate import score
from finetune.groups import build_optimizer
from finetune.load import build_classifier, patch_of
from finetune.views import Labelled, LabelledView, mix
from mae_et import distributed
from mae_et.atomic import write_atomically, write_text_atomically
from mae_et.checkpoint import (
    TrainState,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_aside_newer,
)
from mae_et.config import duration_in_steps
from mae_et.config_files import to_yaml
from mae_et.cost import training_flops
from mae_et.curriculum import Curriculum, Plan, PlannedStage
from mae_et.data import PlannedBatches, micro_batch_size, sample_seed, train_loader, worker_count
from mae_et.datasets import Source, open_source
from mae_et.distributed import World
from mae_et.errors import RunFailed, UserError
from mae_et.folders import classes_without_images
from mae_et.frequency import low_frequency_crop
from mae_et.lock import sole_writer
from mae_et.loop import steps
from mae_et.monitor import SCORES, Monitor, read_metrics
from mae_et.plan_table import COMPUTE_UNITS
from mae_et.precision import autocast, autocast_dtype
from mae_et.run import Run, wrap
from mae_et.same_run import check_same_data, check_same_run
from mae_et.signals import StopFlag, stop_signals
from mae_et.step import update
from mae_et.window import summarise_stages


def classify(config: ClassifierConfig) -> dict[str, Any]:
    """Train a classifier as a config says, going on from the run folder's newest checkpoint.

    Returns:
        The final figures, which are also in the run folder's `results.json`.

    Raises:
        UserError: the config, the data, the checkpoint or the run folder cannot be used.
        RunFailed: the loss became infinite or NaN.
        Interrupted: a signal asked to stop; the state is saved.
    """
    world = distributed.start(config.efficiency.device)
    try:
        with stop_signals() as stopped:
            _classify(config, world, stopped)
    finally:
        distributed.stop(world)
    return json.loads((config.output.folder / "results.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Data:
    """The two splits."""

    train: Source
    val: Source

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)


def _classify(config: ClassifierConfig, world: World, stopped: StopFlag) -> None:
    folder = config.output.folder
    saved = newest_checkpoint(folder / "checkpoints")
    finished = (folder / "results.json").exists()
    check_same_run(config, saved, finished)
    if not distributed.all_have(saved["step"] if saved else 0, world):
        raise RunFailed(f"processes see different checkpoints in {folder}; start again")
    if finished:
        return
    data = open_data(config)
    check_same_data(config, saved, len(data.train))
    torch.manual_seed(config.seed)
    network = build_classifier(config.model, data.classes)
    plan = Plan.from_dict(saved["plan"]) if saved else make_plan(config, network, len(data.train))
    run = prepare(config, network, plan, world, saved)
    view = LabelledView(data.train, config.data, config.recipe, plan, config.seed)
    batches = PlannedBatches(
        plan, config.seed, run.micro_batch, world.rank, world.size, run.state.step
    )
    workers = worker_count(config.efficiency.workers, world.size)
    loader = train_loader(view, batches, workers, pin_memory=world.device.type == "cuda")
    if not world.is_main:
        train(run, iter(loader), data, None, stopped)
    else:
        with sole_writer(folder):
            set_aside_newer(folder / "checkpoints", run.state.step)
            describe(run, data)
            monitor = Monitor(config, plan, run.state.step)
            try:
                train(run, iter(loader), data, monitor, stopped)
                finish(run, monitor)
            finally:
                monitor.close()
    distributed.barrier(world)


def open_data(config: ClassifierConfig) -> Data:
    """Open both splits.

    Raises:
        UserError: there are no labels, or the splits differ in their classes.
    """
    train, val = (
        open_source(config.data, split, config.model.channels) for split in ("train", "val")
    )
    if len(train.classes) < 2:
        raise UserError("a classifier needs labelled images: folders of at least two classes")
    if list(train.classes) != list(val.classes):
        raise UserError("the training and validation splits differ in their classes")
    empty = classes_without_images(val)
    if empty:
        raise UserError(f"the validation split has no image of {', '.join(empty[:5])}")
    return Data(train, val)


def make_plan(config: ClassifierConfig, network: nn.Module, images: int) -> Plan:
    """Resolve the curriculum.

    Raises:
        UserError: the curriculum, the batch and the data do not fit each other.
    """
    size, channels = config.model.image_size, config.model.channels
    curriculum = Curriculum.from_config(config.curriculum, size, patch_of(network, size))
    cost = None
    if config.curriculum.cost == "flops":
        cost = training_flops(copy.deepcopy(network).to("meta"), channels)
    return curriculum.plan(config.curriculum.epochs, images, config.optim.batch_size, cost)


def prepare(
    config: ClassifierConfig,
    network: Any,
    plan: Plan,
    world: World,
    saved: dict[str, Any] | None,
) -> Run:
    """Put a network on its device, with its optimizer, as new or as saved."""
    efficiency = config.efficiency
    micro_batch = micro_batch_size(efficiency.micro_batch, plan, world.size)
    if config.recipe.mixup or config.recipe.cutmix:
        odd = [s.bandwidth for s in plan.stages if micro_batch(s.bandwidth) % 2]
        if odd:
            raise UserError("recipe.mixup and recipe.cutmix need micro-batches of even size")
    if world.device.type == "cuda" and efficiency.tf32:
        torch.set_float32_matmul_precision("high")
    if efficiency.gradient_checkpointing:
        network.set_grad_checkpointing(True)
    network = network.to(world.device)
    dtype = autocast_dtype(efficiency.precision, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    ema = config.optim.ema
    average = None if ema is None else ModelEmaV3(network, decay=ema)
    optimizer = build_optimizer(network, config.optim)
    state = TrainState(network, optimizer, scaler, average=average)
    if saved:
        state.restore(saved)
    wrapped = wrap(network, efficiency, plan, world)
    return Run(config, plan, world, state, wrapped, dtype, micro_batch)


def train(
    run: Run, batches: Iterator[Labelled], data: Data, monitor: Monitor | None, stopped: StopFlag
) -> None:
    """Train to the end and score on the way; only the main process has a monitor, and writes."""
    output = run.config.output
    every = duration_in_steps(output.evaluate_every, run.plan.steps)
    run.state.model.train()
    step = partial(classifier_step, classes=data.classes)
    for moment in steps(run, batches, step, stopped):
        if monitor is not None and moment.row is not None:
            monitor.log(moment.row)
        if run.state.step % every == 0 or moment.last:
            evaluate_and_keep(run, data, monitor)
        if monitor is not None and moment.saving:
            monitor.flush()
            folder = output.folder / "checkpoints"
            save_checkpoint(folder, run.state, to_yaml(run.config), run.plan.to_dict())
            keep = output.keep_every
            keep_every = None if keep is None else duration_in_steps(keep, run.plan.steps)
            prune_checkpoints(folder, output.keep_last, keep_every)


def classifier_step(
    run: Run, stage: PlannedStage, batches: Iterable[Labelled], classes: int
) -> tuple[Tensor, Tensor]:
    """Update a classifier once; return the loss and the gradient's norm.

    Drop path and mixing draw from (seed, step, process, micro-batch), so that a run that goes on
    draws what it would have drawn.
    """
    config, device = run.config, run.world.device
    key = (config.seed, run.state.step, run.world.rank)
    torch.manual_seed(sample_seed(*key))
    numbers = iter(range(run.plan.batch_size))

    def loss_of(batch: Labelled) -> Tensor:
        batch = Labelled(*(part.to(device, non_blocking=True) for part in batch))
        images, targets = mix(batch, config.recipe, classes, sample_seed(*key, next(numbers)))
        images = low_frequency_crop(images, stage.bandwidth, config.crop.method)
        with autocast(run.dtype, device):
            logits = run.network(images)
        return F.cross_entropy(logits.float(), targets)

    result = update(run, stage, batches, loss_of)
    average: Any = run.state.average
    if average is not None:
        average.update(run.state.model, run.state.step)
    return result


def evaluate_and_keep(run: Run, data: Data, monitor: Monitor | None) -> None:
    """Score the weights, and their average if there is one; keep the better ones as they come."""
    config = run.config
    workers = worker_count(config.efficiency.workers, run.world.size)
    scored: Callable[[nn.Module], dict[str, Any]] = lambda network: score(  # noqa: E731
        network, data.val, config.data, config.model.image_size, run.world, run.dtype,
        run.micro_batch(run.plan.base), workers,
    ).summary()  # fmt: skip
    scores = scored(run.state.model)
    average: Any = run.state.average
    if average is not None:
        scores |= {f"average_{key}": value for key, value in scored(average.module).items()}
    if monitor is None:
        return
    best = best_score(config.output.folder)
    monitor.score(run.state.step, scores)
    if _deciding(scores) > best:
        write_weights(run, config.output.folder / "best.safetensors")


def best_score(folder: Path) -> float:
    """Return the best top-1 so far, in percent; -1 where there is none."""
    return max((_deciding(row) for row in read_metrics(folder, SCORES)), default=-1.0)


def describe(run: Run, data: Data) -> None:
    """Write down what is trained."""
    folder = run.config.output.folder
    network: Any = run.state.model
    is_vit = isinstance(run.state.model, VisionTransformer)
    heads = network.blocks[0].attn.num_heads if is_vit else None
    about = {"classes": list(data.train.classes), "encoder_heads": heads}
    write_text_atomically(folder / "config.yaml", to_yaml(run.config))
    write_text_atomically(folder / "plan.json", json.dumps(run.plan.to_dict(), indent=1))
    write_text_atomically(folder / "classes.json", json.dumps(about, indent=1))


def finish(run: Run, monitor: Monitor) -> None:
    """Leave the weights and the final figures; the latter last, for they say that all is done."""
    folder, plan = run.config.output.folder, run.plan
    write_weights(run, folder / "model.safetensors")
    rows, scores = read_metrics(folder), read_metrics(folder, SCORES)
    best = max(scores, key=_deciding)
    results = {
        **{key: value for key, value in scores[-1].items() if key not in {"step", "time"}},
        "best_top1": _deciding(best),
        "best_step": best["step"],
        "steps": plan.steps,
        "train_images": plan.images,
        "equivalent_epochs": plan.equivalent_epochs,
        "compute": plan.compute,
        "compute_unit": COMPUTE_UNITS[run.config.curriculum.cost],
        "training_seconds": run.state.seconds,
        "stages": summarise_stages(rows, plan),
    }
    monitor.finish(results)
    monitor.flush()
    write_text_atomically(folder / "results.json", json.dumps(results, indent=1))


def write_weights(run: Run, path: Path) -> None:
    """Write the weights that decide (the average where there is one), with timm's names."""
    average: Any = run.state.average
    network: Any = run.state.model if average is None else average.module
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    content = safetensors_bytes(tensors, {"format": "pt"})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _deciding(scores: dict[str, Any]) -> float:
    return float(scores.get("average_top1", scores["top1"]))
