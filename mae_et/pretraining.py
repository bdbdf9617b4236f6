"""Pre-train a masked autoencoder under a frequency curriculum: the method, top to bottom.

    config -> plan -> batch -> device -> mask -> crop(S) -> normalise -> encode -> target
           -> decode -> loss -> step -> checkpoint -> encoder

A `Plan` fixes the bandwidth S of each step before training. Only the `TrainState` changes while
training; everything else is a function of the config and the step, so a run resumes exactly from
its newest checkpoint. (`mae_et.pretrain` is the function, hence this module's name.)

Shapes: B micro-batch, C channels, H base size, S bandwidth, N = (S / patch)^2 patches, V visible
patches, M predicted patches, W width, D numbers per patch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_et.checkpoints.initial_weights import load_initial_weights
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.config.schema import ENCODER, PretrainConfig
from mae_et.config.typed import typed
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.batch import Batch, black_batch
from mae_et.data.datasets import ImageDataset
from mae_et.data.device.memory_ahead import memory_ahead
from mae_et.data.encoder_input import encoder_input
from mae_et.data.train_dataset import TrainDataset
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.training.metrics import pretraining_figures
from mae_et.training.online_probe import OnlineProbe
from mae_et.training.opening import open_training_images, say_command
from mae_et.training.optim import build_optimizer
from mae_et.training.periodic import Periodic
from mae_et.training.plan import make_plan
from mae_et.training.preview import draw_preview
from mae_et.training.reconstructions import PeriodicReconstructions, gather_model
from mae_et.training.run import Run
from mae_et.training.session import train_run, write_results
from mae_et.training.task import Task


def pretrain(config: PretrainConfig, stop_after_step: int | None = None) -> Path:
    """Pre-train as configured, resuming from the run folder's newest checkpoint.

    A new run starts from random weights, from other weights (`config.init.weights`), or from a
    checkpoint of another run (`config.branch_from`, `config.init.extends`); a line on stderr names
    the source. The command line adopts the statistics and the position grid of initial weights;
    this function uses `config.data` and `config.model.position_grid`, and the line reports
    differences.

    Args:
        config: the run.
        stop_after_step: save the state and return after this many steps, for a later call to
            resume; by default, train to the end.

    Returns:
        The run folder; a finished run has `encoder.safetensors` (a timm model) and `results.json`.

    Raises:
        UserError: the config, the data or the run folder cannot be used.
        RunFailed: the loss or a gradient became infinite or NaN, images cannot be read, memory ran
            out, or a loader process died.
        Interrupted: a signal asked to stop; the state is saved.
    """
    config = typed(config, PretrainConfig)
    say_command("pretrain", config)
    train_run(Pretraining(config), stop_after_step)
    return config.output.dir


class Pretraining(Task):
    """Pre-train a masked autoencoder; `train_run` calls the methods in this order.

    Override `open_images` to train on images of your own, and `model` or `loss` to train another
    model or towards another target (`examples/own_pretraining.py`).

    Attributes:
        config: the run.
        model: the class to train, built by its `from_config`.
        source: the training images, once they are open.
    """

    replayable = fits_by_default = True
    model: type[MaskedAutoencoder] = MaskedAutoencoder

    def __init__(self, config: PretrainConfig, source: ImageDataset | None = None):
        self.config: PretrainConfig = config
        self.source = source

    def open_images(self) -> ImageDataset:
        """Open the training images, unless they are open."""
        if self.source is None:
            self.source = open_training_images(self.config)
        return self.source

    def build_model(
        self, saved: dict[str, Any] | None, world: DistributedContext
    ) -> tuple[MaskedAutoencoder, dict[str, Any]]:
        """Build the model, new: random, or from initial weights."""
        model = self.model.from_config(self.config.model)
        if saved is None:
            initial = load_initial_weights(model, self.config, world)
        else:
            initial = saved["origin"].get("init")
        model.set_gradient_checkpointing(self.config.efficiency.gradient_checkpointing)
        return model, {"init": initial}

    def make_plan(self, model: nn.Module, images: int) -> Plan:
        """Resolve the curriculum; `train_run` takes an extended run's from its checkpoint."""
        return make_plan(self.config, images)

    def build_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Build AdamW."""
        return build_optimizer(model, self.config.optim)

    def dry_pass(self, run: Run, stage: PlannedStage, count: int) -> None:
        """Run forward and backward on black images, beside the loader's memory."""
        batch, data = black_batch(self.config.model, stage, count), self.config.data
        kept = data.replay_images if data.replay else 0
        with memory_ahead(self.config.efficiency.decode, batch.images, run.world.device, kept):
            self.loss(run, stage, batch).backward()

    def augment(self, model: nn.Module, images: ImageDataset, plan: Plan) -> TrainDataset:
        """Return views of the images, with the noise of their masks."""
        return TrainDataset.from_config(self.config, images, plan)

    def periodic(self, run: Run) -> list[Periodic]:
        """Draw reconstructions and probe the encoder."""
        periodic: list[Periodic] = []
        if self.config.output.reconstruct_images > 0:
            periodic.append(PeriodicReconstructions(run, self.open_images()))
        if self.config.probe.every is not None:
            periodic.append(OnlineProbe(run, self.config.probe, self.open_images()))
        return periodic

    def preview(self, run: Run, dataset: TrainDataset) -> Tensor | None:
        """Draw training views."""
        draws = self.config.output.reconstruct_images > 0
        return draw_preview(self.config, run.plan, dataset) if draws else None

    def loss(self, run: Run, stage: PlannedStage, batch: Batch, number: int = 0) -> Tensor:
        """Return the mean squared error over the predicted patches of a micro-batch."""
        config, device = self.config, run.world.device
        images = batch.images.to(device, non_blocking=True)  # uint8 [B C H H]; [B C S S] if decoded
        noise = batch.noise.to(device, non_blocking=True)  # float32 [B N]
        images, mask = encoder_input(  # crop to [B C S S], normalise, mask
            images, noise, stage.bandwidth, config.crop.method, config.model.mask_ratio, config.data
        )
        with autocast(run.dtype, device):
            # MaskedAutoencoder.forward: encode the visible patches [B 1+V W]; target [B N D] of the
            # images; decode [B M D]; loss [] over the M predicted patches.
            return run.network(images, mask).loss

    def finish(self, run: Run, logger: RunLogger | None) -> None:
        """Export the encoder and write results.json."""
        model = gather_model(run)
        if logger is None:
            return
        config = self.config
        preprocessing = Preprocessing.of_run(config.data, config.model.image_size)
        export_encoder(model.encoder, config.output.dir / ENCODER, config.model, preprocessing)
        write_results(run, logger, pretraining_figures(run))
