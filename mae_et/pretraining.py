"""Pre-train a masked autoencoder under the frequency curriculum: the method, top to bottom.

config -> plan -> model -> loop -> encoder. Whatever changes while training is in the `TrainState`;
the rest is a function of the config and the step, so a run goes on from its newest checkpoint as if
it had never stopped.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et.checkpoints.store import export_encoder
from mae_et.config.files import plain
from mae_et.config.schema import PretrainConfig, duration_in_steps
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.curriculum.schedule import Plan, PlannedStage
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.data.loader import training_batches
from mae_et.data.sampler import micro_batch_size
from mae_et.data.transforms import Batch, EvalDataset, TrainDataset, normalise
from mae_et.errors import Interrupted, Unreadable, UserError
from mae_et.io.metrics_file import read_metrics
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.divergence import last_loss
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.reconstructions import panel_grid, reconstruction_panels
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import set_precision
from mae_et.runtime.signals import PAUSE, StopFlag
from mae_et.training.fsdp import full_state_dict, shard
from mae_et.training.loop import save, steps
from mae_et.training.micro_batch import fit_micro_batch
from mae_et.training.optim import build_optimizer
from mae_et.training.plan import curriculum_of, make_plan
from mae_et.training.resume import check_same_data, provenance_of
from mae_et.training.run import Run, TrainState, wrap
from mae_et.training.session import distributed_session, find_checkpoint, run_records, write_results
from mae_et.training.step import reconstruction_loss, train_step


def pretrain(config: PretrainConfig, stop_after_step: int | None = None) -> Path:
    """Pre-train as a config says, going on from the run folder's newest checkpoint.

    Args:
        config: the run.
        stop_after_step: step after which to save the state and return, for a later call to resume;
            by default the run goes to its end.

    Returns:
        The run folder, with `encoder.safetensors` (a timm model) and `results.json` in it.

    Raises:
        UserError: the config, the data or the run folder cannot be used.
        RunFailed: the loss or a gradient became infinite or NaN, images cannot be read, memory ran
            out, or a loader process died.
        Interrupted: a signal asked to stop; the state is saved.
    """
    try:
        with distributed_session(config.efficiency) as (world, stopped):
            _pretrain(config, world, stopped, stop_after_step)
    except Interrupted as stop:
        if stop.signal != PAUSE:
            raise
    return config.output.dir


def _pretrain(
    config: PretrainConfig,
    world: DistributedContext,
    stopped: StopFlag,
    stop_after_step: int | None,
) -> None:
    saved, finished = find_checkpoint(config, world)
    # An encoder that was deleted since is written again, from the last state.
    encoder = config.output.dir / "encoder.safetensors"
    finished = finished and (saved is None or encoder.exists())
    if finished or (
        stop_after_step is not None and saved is not None and saved["step"] >= stop_after_step
    ):
        return
    curriculum = curriculum_of(config)  # refused before the data are looked for
    source = open_dataset(config.data, "train", config.model.channels)
    origin = provenance_of(source, world)
    check_same_data(config, saved, len(source), origin)
    plan = Plan.from_dict(saved["plan"]) if saved else make_plan(config, len(source), curriculum)
    run, model = prepare(config, plan, world, saved)
    run.origin = origin
    del saved
    view = TrainDataset(
        source, config.data, plan, config.model.patch, config.seed, config.crop.method
    )
    with training_batches(run, view) as loaded, run_records(run) as monitor:
        train(run, model, loaded, monitor, source, stopped, stop_after_step)
        finish(run, model, monitor)
    distributed.barrier(world)


def prepare(
    config: PretrainConfig, plan: Plan, world: DistributedContext, saved: dict[str, Any] | None
) -> tuple[Run, MaskedAutoencoder]:
    """Build model and optimizer, as new or as saved."""
    efficiency = config.efficiency
    micro_batch = micro_batch_size(efficiency.micro_batch, plan, world.size)
    dtype, scaler = set_precision(efficiency, world.device)
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder.from_config(config.model)
    shards = efficiency.sharding == "full" and world.size > 1
    fits = efficiency.micro_batch == "auto"
    if fits or not shards:  # shards are moved block by block: one GPU may not hold the whole
        model = model.to(world.device)
    model.set_gradient_checkpointing(efficiency.gradient_checkpointing)
    state = TrainState(model, build_optimizer(model, config.optim), scaler)
    run = Run(config, plan, world, state, model, dtype, micro_batch)
    if fits:
        fit_micro_batch(run, saved, partial(pass_on_zeros, run))
    if shards:
        if scaler.is_enabled():
            raise UserError("efficiency.sharding full needs efficiency.precision bf16 or fp32")
        shard(model, world)
        state.optimizer, state.sharded = build_optimizer(model, config.optim), True
    if saved:
        state.restore(saved)
    run.network = wrap(model, efficiency, plan, world, run.micro_batch)
    return run, model


def whole_model(run: Run, model: MaskedAutoencoder) -> MaskedAutoencoder:
    """Return the model; of shards, gathered on the main process's CPU: every process must ask."""
    if not run.state.sharded:
        return model
    weights = full_state_dict(model)
    if run.world.is_main:
        with torch.device("meta"):
            model = MaskedAutoencoder.from_config(run.config.model)
        model.load_state_dict(weights, assign=True)
    return model


def pass_on_zeros(run: Run, stage: PlannedStage, count: int) -> None:
    """Go forward and backward through the network, on as many black images as are asked for."""
    model = run.config.model
    images = torch.zeros(count, model.channels, *[model.image_size] * 2, dtype=torch.uint8)
    noise = torch.zeros(count, (stage.bandwidth // model.patch) ** 2)
    reconstruction_loss(run, stage, Batch(images, noise)).backward()


def train(
    run: Run,
    model: MaskedAutoencoder,
    batches: Iterator[Batch],
    monitor: RunLogger | None,
    source: ImageDataset,
    stopped: StopFlag,
    stop_after_step: int | None = None,
) -> None:
    """Train to the end, or up to a step; only the main process has a monitor, and writes."""
    state = run.state
    if state.step and draws(run):
        # Stopped between a checkpoint and the picture that was due with it.
        missing = monitor is not None and not monitor.has_image(state.step)
        if distributed.any_rank(missing, run.world):
            draw(run, whole_model(run, model), monitor, source)
    pause_at(stop_after_step, run, stopped)
    for moment in steps(run, batches, train_step, stopped):
        if monitor is not None:
            monitor.advance(state.step)
            if moment.row is not None:
                monitor.log(moment.row)
        if moment.saving:
            save(run, monitor)
        if draws(run) and not moment.stopping:
            draw(run, whole_model(run, model), monitor, source)
        pause_at(stop_after_step, run, stopped)


def pause_at(stop_after_step: int | None, run: Run, stopped: StopFlag) -> None:
    """Have the loop stop after its next step, if that is the step to stop after."""
    if (
        stop_after_step is not None
        and run.state.step + 1 >= stop_after_step
        and stopped.signal is None
    ):
        stopped.signal = PAUSE


def draws(run: Run) -> bool:
    """Return whether a picture is due with the state as it is."""
    output, step, last = run.config.output, run.state.step, run.plan.steps
    due = step % duration_in_steps(output.reconstruct_every, last) == 0 or step == last
    return due and output.reconstruct_images > 0


def draw(
    run: Run, model: MaskedAutoencoder, monitor: RunLogger | None, source: ImageDataset
) -> None:
    """Draw reconstructions of a few images, always the same, at the stage's bandwidth."""
    if monitor is None:
        return
    config, stage = run.config, run.plan.at(run.state.step - 1)
    view = EvalDataset(source, config.data, config.model.image_size)
    generator = torch.Generator().manual_seed(config.seed)
    # At random, for neighbours are of one class in a folder.
    places = torch.randperm(len(view), generator=generator).tolist()
    readables = readable(view, places, config.data.on_error == "skip")
    found = list(islice(readables, config.output.reconstruct_images))
    # Where the model is: gathered from shards, on the CPU.
    images = torch.stack(found).to(next(model.parameters()).device)
    images = normalise(images, config.data.mean, config.data.std)
    images = low_frequency_crop(images, stage.bandwidth, config.crop.method)
    noise = torch.rand(len(found), (stage.bandwidth // model.patch) ** 2, generator=generator)
    panels = reconstruction_panels(
        model, images, noise.to(images.device), config.model.mask_ratio, config.data
    )
    monitor.log_image(run.state.step, panel_grid(panels))


def readable(view: EvalDataset, places: Iterable[int], skips: bool) -> Iterator[Tensor]:
    """Yield the images at places, and pass over those that cannot be read, if they are skipped."""
    for place in places:
        try:
            yield view[place][0]
        except Unreadable:
            if not skips:
                raise


def finish(run: Run, model: MaskedAutoencoder, monitor: RunLogger | None) -> None:
    """Leave the encoder and the final figures."""
    model = whole_model(run, model)
    if monitor is None:
        return
    folder = run.config.output.dir
    description = json.dumps(plain(run.config.model))
    export_encoder(model.encoder, folder / "encoder.safetensors", description)
    rows = read_metrics(folder)
    figures = {
        "loss": last_loss(rows),
        "loss_at_first": rows[0].get("loss") if rows else None,
        "images": run.plan.images,
    }
    write_results(run, monitor, rows, figures)
