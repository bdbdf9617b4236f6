"""Build training steps to time: mae-et's, and those of the plain reference."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mae_et.config.data import IMAGENET_MEAN, IMAGENET_STD
from mae_et.config.efficiency import Precision
from mae_et.config.model import ModelConfig, visible_patches
from mae_et.config.schema import OptimConfig
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.data.batch import Batch
from mae_et.data.transforms import normalise
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import mask_from_noise
from mae_et.runtime.precision import allow_tf32, autocast, autocast_dtype
from mae_et.training.efficiency.compile import compile_network
from mae_et.training.efficiency.cuda_graphs import GraphedPasses
from mae_et.training.optim import build_optimizer

from .reference import PlainAutoencoder

Built = tuple[MaskedAutoencoder, Any, torch.optim.Optimizer]


def reference_step(
    config: ModelConfig, batch: int, precision: Precision, device: torch.device
) -> Callable[[], object]:
    """Return a step of the plain reference with the sizes of a model."""
    torch.manual_seed(0)
    size, decoder = config.image_size, (config.decoder_embed_dim, config.decoder_depth)
    model = PlainAutoencoder(config.encoder, size, *decoder, config.decoder_num_heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    pixels = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    noise = torch.rand(batch, (size // model.patch) ** 2, device=device)
    visible = visible_patches(noise.shape[1], config.mask_ratio)
    dtype = autocast_dtype(precision, device)

    def loss() -> Tensor:
        with autocast(dtype, device):
            return model(normalise(pixels, IMAGENET_MEAN, IMAGENET_STD), noise, visible)

    return _update(lambda: loss().backward(), optimizer, device)


def training_step(
    model: ModelConfig,
    batch: int,
    bandwidth: int,
    precision: Precision,
    device: torch.device,
    compiled: bool = False,
    replayed: bool | None = None,
) -> Callable[[], object]:
    """Return a step of mae-et, starting from uint8 images of the base size in memory."""
    built = network_of(model, device, 1 if compiled else None)
    return step_of(built, model, batch, bandwidth, precision, device, replayed)


def network_of(
    model: ModelConfig,
    device: torch.device,
    compiled_for: int | None,
    optim: OptimConfig | None = None,
) -> Built:
    """Return a model, its callable (compiled for a number of bandwidths), and its optimizer."""
    torch.manual_seed(0)
    allow_tf32(True, device)  # as runs do
    network = MaskedAutoencoder.from_config(model).to(device)
    optimizer = build_optimizer(network, optim or OptimConfig())
    called = network if compiled_for is None else compile_network(network, compiled_for)
    return network, called, optimizer


def step_of(
    built: Built,
    model: ModelConfig,
    batch: int,
    bandwidth: int,
    precision: Precision,
    device: torch.device,
    replayed: bool | None = None,
    waits: bool = True,
) -> Callable[[], object]:
    """Return a step of a network, starting from uint8 images of the base size in memory.

    `replayed` is whether its passes are replayed as CUDA graphs; on a GPU, they are by default, as
    in a run. `waits` is whether a step waits for the GPU, as timing requires; a run's do not.
    """
    network, called, optimizer = built
    dtype = autocast_dtype(precision, device)
    shape = batch, model.channels, model.image_size, model.image_size
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device)
    noise = torch.rand(batch, (bandwidth // network.patch) ** 2, device=device)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if model.channels == 3 else ((0.5,), (0.25,))

    def work(batch: Batch) -> Tensor:
        images = normalise(low_frequency_crop(batch.images, bandwidth), mean, std)
        with autocast(dtype, device):
            loss = called(images, mask_from_noise(batch.noise, model.mask_ratio)).loss
        loss.backward()
        return loss.detach()

    one = Batch(pixels, noise, torch.zeros(batch, dtype=torch.int64))
    if not (device.type == "cuda" if replayed is None else replayed):
        return _update(partial(work, one), optimizer, device, waits)
    trained = [p for p in network.parameters() if p.requires_grad]
    replay = partial(GraphedPasses(trained), work, one, bandwidth, first=True)
    return _update(replay, optimizer, device, waits)


def _update(
    work: Callable[[], object],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    waits: bool = True,
) -> Callable[[], object]:
    """Return a step of `work`, which computes gradients."""

    def step() -> None:
        work()
        optimizer.step()
        optimizer.zero_grad()
        if waits:
            wait(device)

    return step


def wait(device: torch.device) -> None:
    """Synchronise with the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
