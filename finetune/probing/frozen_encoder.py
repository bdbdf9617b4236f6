"""Open the encoder of any checkpoint, frozen, for probes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.image_size import Size, check_tiles, height_and_width, patch_side
from finetune.probing.pooled_backbone import PooledBackbone, kind_of
from finetune.run_folder import check_scored_data, no_data, read_classifier_config
from finetune.scoring_config import FrozenNetworkConfig
from finetune.training.model import load_run_network
from mae_et.checkpoints.encoders import encoder_of_weights, named_network, returns_tokens
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.load import masked_autoencoder
from mae_et.checkpoints.preprocessing import Preprocessing, report_preprocessing
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.checkpoints.weights import Weights
from mae_et.config.data import DataConfig
from mae_et.config.model import ModelConfig
from mae_et.errors import UserError
from mae_et.models.mae import MaskedAutoencoder, initialise


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder, and the settings that probes need."""

    network: Any
    """timm vision transformer, or a `PooledBackbone`, in evaluation mode."""
    encode: Callable[[Tensor], Tensor]
    """From normalised images [B C H W] to tokens [B P+N D]."""
    image_size: tuple[int, int]
    """Height and width of the images, in pixels."""
    initialise: Callable[[], None]
    """Replaces the weights by freshly initialised ones."""
    preprocessing: Preprocessing | None = None
    """Preprocessing of its training images, if the checkpoint records it."""
    data: DataConfig | None = None
    """Data that the encoder was pre-trained on, if the checkpoint records them."""
    takes_any_size: bool = False
    """Whether `encode` accepts images of every size that patches tile."""
    resized: bool = False
    """Whether the size is not the encoder's own."""

    @property
    def channels(self) -> int:
        """Image channels, read from the first convolution (a stem may precede the patches)."""
        parts = self.network.modules()
        return next(part.in_channels for part in parts if isinstance(part, nn.Conv2d))

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return patch_side(self.network.patch_embed)

    def at_size(self, image_size: Size | None) -> "FrozenEncoder":
        """Return the encoder for images of another size, with positions resampled if needed.

        None is its own size. The network is shared and resized in place: this object must not be
        used afterwards.

        Raises:
            UserError: patches do not tile the size, or timm cannot resize the network.
        """
        if image_size is None:
            return self
        size = height_and_width(image_size)
        if not isinstance(self.network, PooledBackbone):
            check_tiles(image_size, self.patch, "image_size")
        if size != self.image_size and not self.takes_any_size:
            try:
                self.network.set_input_size(img_size=size)
            except (AssertionError, AttributeError) as error:  # hybrids, networks without it
                raise UserError(
                    f"image_size: timm cannot resize this {kind_of(self.network)}"
                ) from error
        return replace(self, image_size=size, resized=size != self.image_size)


def open_encoder_and_data(
    config: FrozenNetworkConfig, needs_images: bool = True
) -> tuple[FrozenEncoder, DataConfig]:
    """Open the encoder of a config at its image size, with the given data or else its own.

    Differences from the encoder's training preprocessing are printed. Without `needs_images`, only
    the statistics of the data are used, which default to ImageNet's.
    """
    path = config.checkpoint
    if needs_images:
        check_scored_data(config)
    encoder = open_encoder(
        path, config.encoder_num_heads, config.architecture, config.checkpoint_key
    )
    data = config.data or encoder.data
    if data is None and not needs_images:
        recorded = encoder.preprocessing
        data = DataConfig(**recorded.data_settings()) if recorded else DataConfig()
    if data is None:
        raise no_data(path)
    report_preprocessing(encoder.preprocessing, data, path)
    return encoder.at_size(config.image_size), data


def open_encoder(
    checkpoint: str | Path,
    encoder_num_heads: int | None = None,
    architecture: str | None = None,
    checkpoint_key: str | None = None,
) -> FrozenEncoder:
    """Open the encoder of a checkpoint, with what the checkpoint records of its images.

    Arguments and errors are those of `mae_et.load_encoder`.
    """
    source = recognise(Path(checkpoint), checkpoint_key, architecture)
    if source.is_named:
        recorded = source.preprocessing()
        size = recorded.image_size if recorded else None
        return replace(_of_network(named_network(source), size), preprocessing=recorded)
    run = read_classifier_config(source.path)
    if run is not None and run.model.backbone is not None:
        tensors = read_weight_file(source.path / "model.safetensors")
        network = load_run_network(run.model, source.path, tensors)
        if not returns_tokens(network):
            pooled = _of_network(network, run.model.image_size)
            return replace(pooled, preprocessing=source.preprocessing(), data=run.data)
    weights = load_weights(source.path, checkpoint_key).with_given(encoder_num_heads)
    encoder = replace(frozen_encoder_from_weights(weights), preprocessing=weights.preprocessing)
    return encoder if run is None else replace(encoder, data=run.data)


def frozen_encoder_from_weights(weights: Weights) -> FrozenEncoder:
    """Build the encoder of loaded weights; see `open_encoder`."""
    try:
        model = masked_autoencoder(weights, decoder=False)
    except UserError:
        if weights.model is not None:  # our own run, which must fit
            raise
        return _of_network(encoder_of_weights(weights))
    data = weights.config.data if weights.config else None
    encoder = frozen_encoder_of_model(model, data)
    if weights.model is None:
        return encoder
    return replace(encoder, initialise=partial(_initialise_as_trained, model, weights.model))


def frozen_encoder_of_model(
    model: MaskedAutoencoder, data: DataConfig | None = None
) -> FrozenEncoder:
    """Return a masked autoencoder's encoder, which encodes without masking."""
    height, width = (side * model.patch for side in model.base_grid)
    fresh = partial(initialise, model)
    return FrozenEncoder(
        model.encoder.eval(), model.encode, (height, width), fresh, data=data, takes_any_size=True
    )


def _initialise_as_trained(model: MaskedAutoencoder, config: ModelConfig) -> None:
    """Initialise an encoder as its pre-training did: the decoder shares the random generator."""
    with torch.random.fork_rng(devices=[]):
        whole = MaskedAutoencoder.from_config(config)
    initialise(whole)
    model.encoder.load_state_dict(whole.encoder.state_dict())


def _of_network(network: Any, image_size: Size | None = None) -> FrozenEncoder:
    """Return a timm network; the size is that of its images, if it takes any."""
    network.eval()
    fresh = getattr(network, "init_weights", None) or partial(refuse_to_initialise, network)
    if returns_tokens(network):
        height, width = network.patch_embed.img_size
        return FrozenEncoder(network, network.forward_features, (height, width), fresh)
    size = height_and_width(image_size or network.default_cfg["input_size"][1:])
    pooled, of_one_size = PooledBackbone(network), network.default_cfg.get("fixed_input_size")
    return FrozenEncoder(
        pooled, pooled.forward_features, size, fresh, takes_any_size=not of_one_size
    )


def refuse_to_initialise(network: Any) -> None:
    """Refuse fresh weights for a network that timm cannot initialise again."""
    raise UserError(f"untrained: timm cannot initialise a {type(network).__name__} again")
