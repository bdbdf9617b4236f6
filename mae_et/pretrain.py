"""Pre-train a masked autoencoder under the frequency curriculum: the method, top to bottom.

config -> plan -> model -> loop -> encoder. Whatever changes while training is in the `TrainState`;
the rest is a function of the config and the step, so a run goes on from its newest checkpoint as if
it had never stopped.
"""

import json
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et import distributed
from mae_et.atomic import write_text_atomically
from mae_et.checkpoint import (
    TrainState,
    export_encoder,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from mae_et.config import PretrainConfig, duration_in_steps
from mae_et.config_files import plain, to_yaml
from mae_et.cost import training_flops
from mae_et.curriculum import Curriculum, Plan, PlannedStage
from mae_et.data import (
    Batch,
    EvalView,
    PlannedBatches,
    TrainView,
    micro_batch_size,
    normalise,
    train_loader,
    worker_count,
)
from mae_et.datasets import Source, open_source
from mae_et.distributed import World
from mae_et.errors import Interrupted, UserError
from mae_et.frequency import low_frequency_crop
from mae_et.model import MaskedAutoencoder
from mae_et.monitor import RUN_SECTIONS, Monitor, read_metrics
from mae_et.optim import build_optimizer, set_schedule
from mae_et.panels import picture, reconstruction_panels
from mae_et.precision import autocast_dtype
from mae_et.pretrained import config_of
from mae_et.signals import StopFlag, stop_signals
from mae_et.step import Trainer, train_step, wrap
from mae_et.window import Window, summarise_stages

# Processes ask each other every so many steps whether one was told to stop.
AGREE_EVERY = 10


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as a config says, going on from the run folder's newest checkpoint.

    Returns:
        The run folder, with `encoder.safetensors` (a timm model) and `results.json` in it.

    Raises:
        UserError: the config, the data or the run folder cannot be used.
        RunFailed: the loss became infinite or NaN.
        Interrupted: a signal asked to stop; the state is saved.
    """
    world = distributed.start(config.efficiency.device)
    try:
        with stop_signals() as stopped:
            return _pretrain(config, world, stopped)
    finally:
        distributed.stop(world)


def _pretrain(config: PretrainConfig, world: World, stopped: StopFlag) -> Path:
    folder = config.output.folder
    if (folder / "results.json").exists():
        _check_same_run(folder, config, newest_checkpoint(folder / "checkpoints"))
        return folder
    source = open_source(config.data, "train", config.model.channels)
    saved = newest_checkpoint(folder / "checkpoints")
    _check_same_run(folder, config, saved)
    plan = Plan.from_dict(saved["plan"]) if saved else make_plan(config, len(source))
    _check_data(folder, plan, len(source))

    if world.device.type == "cuda" and config.efficiency.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder.from_config(config.model).to(world.device)
    model.set_gradient_checkpointing(config.efficiency.gradient_checkpointing)
    dtype = autocast_dtype(config.efficiency.precision, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    state = TrainState(model, build_optimizer(model, config.optim), scaler)
    if saved:
        state.restore(saved)
    del saved
    micro = micro_batch_size(config.efficiency.micro_batch, plan, world.size)
    trainer = Trainer(config, plan, world, state, wrap(model, config, world), dtype, micro)
    view = TrainView(source, config.data, plan, model.patch, config.seed)
    batches = PlannedBatches(plan, config.seed, micro, world.rank, world.size, state.step)
    workers = worker_count(config.efficiency.workers, world.size)
    loader = train_loader(view, batches, workers, world.device.type == "cuda")
    monitor = None
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / "config.yaml", to_yaml(config))
        write_text_atomically(folder / "plan.json", json.dumps(plan.to_dict(), indent=1))
        monitor = Monitor(config, plan, state.step)
    try:
        _loop(trainer, iter(loader), monitor, source, stopped)
        if monitor is not None:
            _finish(trainer, monitor)
    finally:
        if monitor is not None:
            monitor.close()
    distributed.barrier(world)
    return folder


def _loop(
    trainer: Trainer,
    batches: Iterator[Batch],
    monitor: Monitor | None,
    source: Source,
    stopped: StopFlag,
) -> None:
    """Train from the state's step to the plan's last."""
    config, plan, world, state = trainer.config, trainer.plan, trainer.world, trainer.state
    log_every, save_every, draw_every = (
        duration_in_steps(d, plan.steps)
        for d in (
            config.output.log_every,
            config.output.checkpoint_every,
            config.output.reconstruct_every,
        )
    )
    window = Window()
    while state.step < plan.steps:
        stage = plan.at(state.step)
        set_schedule(state.optimizer, plan.progress(state.step), config.optim)
        micro_batches = window.timed(islice(batches, trainer.accumulation(stage)))
        window.add(*train_step(trainer, stage, micro_batches))
        state.step += 1

        last = state.step == plan.steps
        asked = world.size == 1 or state.step % AGREE_EVERY == 0
        stopping = asked and distributed.agree(stopped.signal is not None, world) and not last
        saving = state.step % save_every == 0 or last or stopping
        stage_ends = state.step == stage.start + stage.steps
        if state.step % log_every == 0 or stage_ends or saving:
            row = window.close(trainer, stage)
            if monitor is not None:
                monitor.log(row)
        drawing = config.output.reconstruct_images > 0 and (state.step % draw_every == 0 or last)
        if monitor is not None and drawing:
            with window.paused():
                monitor.picture(state.step, draw_reconstructions(trainer, source, stage))
        if monitor is not None and saving:
            with window.paused():
                monitor.flush()
                save(trainer)
        if stopping:
            distributed.barrier(world)
            number = stopped.signal or signal.SIGTERM
            raise Interrupted(state.step, number, str(config.output.folder))


def make_plan(config: PretrainConfig, dataset_size: int) -> Plan:
    """Resolve a config's curriculum for a data set.

    Raises:
        UserError: the curriculum, the batch and the data do not fit each other.
    """
    curriculum = Curriculum.from_config(
        config.curriculum, config.model.image_size, config.model.patch
    )
    cost = None
    if config.curriculum.cost == "flops":
        with torch.device("meta"):
            model = MaskedAutoencoder.from_config(config.model)
        cost = training_flops(model, config.model.channels, config.model.mask_ratio)
    return curriculum.plan(config.curriculum.epochs, dataset_size, config.optim.batch_size, cost)


def draw_reconstructions(trainer: Trainer, source: Source, stage: PlannedStage) -> Tensor:
    """Return a picture of the first images' reconstructions, at the stage's bandwidth."""
    config, device = trainer.config, trainer.world.device
    model = trainer.state.model
    assert isinstance(model, MaskedAutoencoder)
    view = EvalView(source, config.data, config.model.image_size)
    count = min(config.output.reconstruct_images, len(view))
    images = torch.stack([view[i][0] for i in range(count)]).to(device)
    images = normalise(images, config.data.mean, config.data.std)
    images = low_frequency_crop(images, stage.bandwidth, config.crop.method)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.rand(count, (stage.bandwidth // model.patch) ** 2, generator=generator)
    panels = reconstruction_panels(
        model, images, noise.to(device), config.model.mask_ratio, config.data
    )
    return picture(panels)


def save(trainer: Trainer) -> None:
    """Write a checkpoint, then delete those that are no longer wanted."""
    config, plan = trainer.config, trainer.plan
    folder = config.output.folder / "checkpoints"
    save_checkpoint(folder, trainer.state, to_yaml(config), plan.to_dict())
    every = config.output.keep_every
    keep_every = None if every is None else duration_in_steps(every, plan.steps)
    prune_checkpoints(folder, config.output.keep_last, keep_every)


def _finish(trainer: Trainer, monitor: Monitor) -> None:
    """Leave the encoder and the final figures; the last, for it says that the run is done."""
    folder, config, plan = trainer.config.output.folder, trainer.config, trainer.plan
    model = trainer.state.model
    assert isinstance(model, MaskedAutoencoder)
    export_encoder(model.encoder, folder / "encoder.safetensors", json.dumps(plain(config.model)))
    rows = read_metrics(folder)
    results = {
        "loss": rows[-1]["loss"],
        "loss_at_first": rows[0]["loss"],
        "steps": plan.steps,
        "images": plan.images,
        "equivalent_epochs": plan.equivalent_epochs,
        "flops": plan.compute,
        "training_seconds": trainer.state.seconds,
        "stages": summarise_stages(rows, plan),
    }
    monitor.finish(results)
    monitor.flush()
    write_text_atomically(folder / "results.json", json.dumps(results, indent=1))


def _check_same_run(folder: Path, config: PretrainConfig, saved: dict[str, Any] | None) -> None:
    """Refuse a run folder that holds a run of other numbers.

    Raises:
        UserError: a key that decides the numbers differs; the sentence names the first.
    """
    if saved is None:
        return
    before, now = plain(config_of(saved)), plain(config)
    for section in (*RUN_SECTIONS, "seed"):
        pairs = {section: (before[section], now[section])}
        if isinstance(now[section], dict):
            pairs = {f"{section}.{k}": (before[section][k], v) for k, v in now[section].items()}
        for key, (old, new) in pairs.items():
            # Where the data lie may change; what they are is checked by their number.
            if old != new and key not in {"data.root", "data.download"}:
                raise UserError(
                    f"{folder} holds a checkpoint of another run: {key} was {old!r} and is now "
                    f"{new!r}; give another output.folder"
                )


def _check_data(folder: Path, plan: Plan, images: int) -> None:
    if plan.dataset_size != images:
        raise UserError(
            f"{folder} holds a checkpoint of another run: the data had {plan.dataset_size} images "
            f"and now have {images}; give another output.folder"
        )
