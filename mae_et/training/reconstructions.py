"""Draw reconstructions of the same few images during pre-training."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mae_et.data.batch import in_one_dtype
from mae_et.data.datasets import ImageDataset
from mae_et.data.encoder_input import encoder_input
from mae_et.data.probe_images import CentreCrops
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.reconstructions import panel_grid, reconstruction_panels
from mae_et.training.efficiency.fsdp import full_state_dict
from mae_et.training.periodic import Periodic
from mae_et.training.run import Run


class PeriodicReconstructions(Periodic):
    """Reconstructions at the stage's bandwidth, every `output.reconstruct_every`."""

    def __init__(self, run: Run, source: ImageDataset):
        super().__init__(run, run.config.output.reconstruct_every)
        self.source = source

    def recorded(self, step: int, logger: RunLogger) -> bool:
        """Return whether the image of a step exists."""
        return logger.has_image(step)

    def do(self, logger: RunLogger | None) -> None:
        """Draw reconstructions with the current weights."""
        model = gather_model(self.run)
        if logger is not None:
            logger.log_image(self.run.state.step, self.draw(model))

    @torch.no_grad()
    def draw(self, model: MaskedAutoencoder) -> Tensor:
        """Return reconstructions as one image, uint8 [C H W], one row per input."""
        config, plan = self.run.config, self.run.plan
        stage = plan.at(self.run.state.step - 1)
        generator = torch.Generator().manual_seed(config.seed)
        # Chosen at random, because neighbours in a folder have the same class.
        order = torch.randperm(len(self.source), generator=generator).tolist()
        crops = CentreCrops(self.source, config.data, config.model.image_size, order)
        readable = filter(None, map(crops.__getitem__, range(len(crops))))
        found = [image for image, _ in islice(readable, config.output.reconstruct_images)]
        # On the model's device: a gathered model is on the CPU.
        images = torch.stack(in_one_dtype(found)).to(next(model.parameters()).device)
        noise = torch.rand(len(found), (stage.bandwidth // model.patch) ** 2, generator=generator)
        images, mask = encoder_input(
            images, noise.to(images.device), stage.bandwidth, config.crop.method, model.mask_ratio,
            config.data,
        )  # fmt: skip
        panels = reconstruction_panels(model, images, mask, config.data)
        return panel_grid(panels, model.target)


def gather_model(run: Run) -> MaskedAutoencoder:
    """Return the model, gathered on the main rank's CPU if sharded; every rank must call this."""
    model: Any = run.state.model
    if not run.state.sharded:
        return model
    weights = full_state_dict(model)
    if run.world.is_main:
        with torch.device("meta"):
            model = MaskedAutoencoder.from_config(run.config.model)
        model.load_state_dict(weights, assign=True)
    return model
