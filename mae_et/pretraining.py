"""Pre-train a masked autoencoder under a frequency curriculum: the method, top to bottom.

    config -> plan -> batch -> device -> mask -> crop(S) -> normalise -> encode -> target
           -> decode -> loss -> step -> checkpoint -> encoder

A `Plan` fixes the bandwidth S of each step before training. Only the `TrainState` changes while
training; everything else is a function of the config and the step, so a run resumes exactly from
its newest checkpoint. (`mae_et.pretrain` is the function, hence this module's name.)

Shapes: B micro-batch, C channels, H base size, S bandwidth, N = (S / patch)^2 patches, V visible
patches, M predicted patches, W width, D numbers per patch.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et.checkpoints.initial_weights import load_initial_weights
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.config.schema import ENCODER, PretrainConfig
from mae_et.config.typed import typed
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.batch import Batch, black_batch
from mae_et.data.cache import cache_images
from mae_et.data.datasets import ImageDataset
from mae_et.data.device.memory_ahead import memory_ahead
from mae_et.data.encoder_input import encoder_input
from mae_et.data.train_dataset import TrainDataset
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.runtime.signals import StopFlag
from mae_et.training.build import build_run
from mae_et.training.loop import Step
from mae_et.training.metrics import pretraining_figures
from mae_et.training.online_probe import OnlineProbe
from mae_et.training.opening import Opening, open_training_images
from mae_et.training.optim import build_optimizer
from mae_et.training.periodic import Periodic
from mae_et.training.plan import make_plan, resumed_plan
from mae_et.training.preview import draw_preview
from mae_et.training.reconstructions import PeriodicReconstructions, gather_model
from mae_et.training.resume import branch
from mae_et.training.resume.find_checkpoint import find_checkpoint
from mae_et.training.resume.same_data import check_data
from mae_et.training.run import Run
from mae_et.training.session import distributed_session, train_run, write_results
from mae_et.training.step import update


def pretrain(
    config: PretrainConfig,
    stop_after_step: int | None = None,
    *,
    step: Step[Batch] | None = None,
    opening: Opening[ImageDataset] | None = None,
) -> Path:
    """Pre-train as configured, resuming from the run folder's newest checkpoint.

    A new run starts from random weights, from other weights (`config.init.weights`), or from a
    checkpoint of another run (`config.branch_from`, `config.init.extends`); a line on stderr names
    the source. The
    command line adopts the statistics and the position grid of initial weights; this function uses
    `config.data` and `config.model.position_grid`, and the line reports differences.

    Args:
        config: the run.
        stop_after_step: save the state and return after this many steps, for a later call to
            resume; by default, train to the end.
        step: one update of the weights, with the signature of `train_step` (the default).
        opening: the start of this run, if its data is already open (see `Opening`).

    Returns:
        The run folder; a finished run has `encoder.safetensors` (a timm model) and `results.json`.

    Raises:
        UserError: the config, the data or the run folder cannot be used.
        RunFailed: the loss or a gradient became infinite or NaN, images cannot be read, memory ran
            out, or a loader process died.
        Interrupted: a signal asked to stop; the state is saved.
    """
    config = typed(config, PretrainConfig)
    opening = opening or Opening("pretrain", config, open_training_images)
    with distributed_session(config, config.efficiency) as (world, stopped):
        _pretrain(config, world, stopped, stop_after_step, step or train_step, opening)
    return config.output.dir


def _pretrain(
    config: PretrainConfig,
    world: DistributedContext,
    stopped: StopFlag,
    stop_after_step: int | None,
    step: Step[Batch],
    opening: Opening[ImageDataset],
) -> None:
    saved, finished = find_checkpoint(config, world)
    reached = saved is not None and stop_after_step is not None and saved["step"] >= stop_after_step
    if finished or reached:
        return
    with fail_together(world):
        source = opening.data
    saved, files = branch.start(config, saved, source, world)
    provenance = check_data(config, saved, source, world)
    images = cache_images(source, config, world)
    plan = resumed_plan(config, saved, make_plan(config, len(source)))
    run, model = build(config, plan, world, saved, static=step is train_step)
    run.provenance |= provenance
    run.stopped, run.stop_after_step = stopped, stop_after_step
    del saved  # its tensors are in the run now
    opening.say_built(run)
    dataset = TrainDataset.from_config(config, images, plan)
    draws = config.output.reconstruct_images > 0
    periodic: list[Periodic] = [PeriodicReconstructions(run, model, source)] if draws else []
    if config.probe.every is not None:
        periodic.append(OnlineProbe(run, config.probe, model, source))
    train_run(
        run, dataset, step, periodic, partial(finish, run, model), files,
        preview=partial(draw_preview, config, plan, dataset) if draws else None,
    )  # fmt: skip


def build(
    config: PretrainConfig,
    plan: Plan,
    world: DistributedContext,
    saved: dict[str, Any] | None,
    static: bool = True,
) -> tuple[Run, MaskedAutoencoder]:
    """Build the model and its run, new (random, or from initial weights) or from a checkpoint.

    `static`: every pass does the same work, as those of `train_step` do.
    """
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder.from_config(config.model)
    if saved is None:
        initial = load_initial_weights(model, config, world)
    else:
        initial = saved["origin"].get("init")
    model.set_gradient_checkpointing(config.efficiency.gradient_checkpointing)
    optimizer_of = partial(build_optimizer, config=config.optim)
    run = build_run(
        config, plan, world, model, optimizer_of, dry_pass, saved, fit_by_default=True,
        static=static,
    )  # fmt: skip
    run.provenance["init"] = initial
    return run, model


def train_step(run: Run, stage: PlannedStage, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Update the autoencoder once; return the loss [] and the norm of the gradient []."""
    return update(run, stage, batches, partial(reconstruction_loss, run))


def reconstruction_loss(run: Run, batch: Batch) -> Tensor:
    """Return the mean squared error over the predicted patches of a micro-batch, float32 []."""
    config, device = run.config, run.world.device
    stage = run.plan.stages[int(batch.stage[0])]  # the batch carries its stage
    images = batch.images.to(device, non_blocking=True)  # uint8 [B C H H]; [B C S S] with decode
    noise = batch.noise.to(device, non_blocking=True)  # float32 [B N]
    images, mask = encoder_input(  # crop to [B C S S], normalise, mask
        images, noise, stage.bandwidth, config.crop.method, config.model.mask_ratio, config.data
    )
    with autocast(run.dtype, device):
        # MaskedAutoencoder.forward: encode the visible patches [B 1+V W]; target [B N D] of the
        # images; decode [B M D]; loss [] over the M predicted patches.
        return run.network(images, mask).loss


def dry_pass(run: Run, stage: PlannedStage, count: int) -> None:
    """Run forward and backward on `count` black images at a stage, beside the loader's memory."""
    batch, data = black_batch(run.config.model, stage, count), run.config.data
    kept = data.replay_images if data.replay else 0
    with memory_ahead(run.config.efficiency.decode, batch.images, run.world.device, kept):
        reconstruction_loss(run, batch).backward()


def finish(run: Run, model: MaskedAutoencoder, logger: RunLogger | None) -> None:
    """Export the encoder and write results.json."""
    model = gather_model(run, model)
    if logger is None:
        return
    config = run.config
    preprocessing = Preprocessing.of_run(config.data, config.model.image_size)
    export_encoder(model.encoder, config.output.dir / ENCODER, config.model, preprocessing)
    write_results(run, logger, pretraining_figures(run))
