"""Compute the features of a frozen encoder once for a whole split.

Shapes: B batch, C H W image, P prefix tokens, N images or patches, L layers, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from finetune.datasets import open_labelled, quick_look
from finetune.probing.feature_cache import feature_file, read_features, write_features
from finetune.probing.frozen_encoder import FrozenEncoder
from finetune.probing.intermediate_layers import encode_layers
from finetune.scoring_config import FeatureScoreConfig, FrozenNetworkConfig
from mae_et.config.data import DataConfig, check_statistics
from mae_et.config.typed import typed
from mae_et.curriculum.frequency import low_pass
from mae_et.data.cores import compute_threads, worker_count
from mae_et.data.layout import Split
from mae_et.data.loader import batches_of, data_loader
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.errors import UserError, require
from mae_et.models.features import pool_tokens
from mae_et.monitoring.progress import Progress
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast, autocast_dtype
from mae_et.runtime.watchdog import hang_watchdog, heartbeat


class Features(NamedTuple):
    """Features of N images and their labels; any pair of such tensors may be used instead."""

    vectors: Tensor
    """float [N D]."""
    labels: Tensor
    """int64 [N], classes counted from 0."""

    def to(self, device: torch.device | str) -> "Features":
        """Move both tensors to a device."""
        return Features(self.vectors.to(device), self.labels.to(device))


class EncodedBatch(NamedTuple):
    """Tokens of a batch of images."""

    tokens: Tensor
    """float32 [L B P+N D], on the device of the forward passes."""
    rest: Sequence[Any]
    """What the dataset's samples have after the pixels, in batches."""


@torch.no_grad()
def extract_dataset_features(
    encoder: FrozenEncoder,
    data: DataConfig,
    config: FeatureScoreConfig,
    split: Split,
    device: torch.device | str,
    indices: Sequence[int] | None = None,
    bandwidth: int | None = None,
    max_images: int | None = None,
) -> Features:
    """Encode the centre crops of a split at the encoder's image size.

    Args:
        encoder: encoder of any checkpoint (`finetune.open_encoder`).
        data: labelled data.
        config: pooling, batch size, workers and precision, such as a `finetune.ProbeConfig`.
        split: split to encode.
        device: device of the forward passes.
        indices: images to encode, in this order; all by default.
        bandwidth: bandwidth of a low-pass filter applied to the images, along their shorter side;
            none by default.
        max_images: without `indices`, the number of images to encode, drawn evenly, which a line
            reports; all by default.

    Returns:
        Features on the CPU, float32 [N D], in the order of the split or of `indices`.

    Raises:
        UserError: images have no labels, or there are fewer than two classes.
    """
    require(
        isinstance(encoder, FrozenEncoder),
        f"encoder must come from finetune.open_encoder, got a {type(encoder).__name__}",
    )
    data, config = typed(data, DataConfig), typed(config, FeatureScoreConfig)
    device = torch.device(device)
    check_statistics(data, encoder.channels)
    source = open_labelled(data, split, encoder.channels, "scoring an encoder")
    if indices is None:
        indices = quick_look(source, split, max_images)
    kept = feature_file(encoder, source, data, config, device, indices, bandwidth)
    if kept is not None and (found := read_features(kept)):
        return Features(**found)
    images, count = Subset(EvalDataset(source, data, encoder.image_size), indices), len(indices)
    vectors, labels = torch.empty(0), torch.empty(count, dtype=torch.int64)
    start = 0
    with (
        encode_images(encoder, images, data, config, device, bandwidth=bandwidth) as batches,
        Progress(split, count) as progress,
    ):
        for (tokens,), (batch_labels,) in batches:
            pooled = pool_tokens(encoder.network, tokens, config.pool)
            if start == 0:  # allocated once: concatenating parts would need twice the memory
                vectors = torch.empty(count, pooled.shape[1])
            end = start + len(pooled)
            vectors[start:end], labels[start:end] = pooled, batch_labels
            start = end
            progress.advance(len(pooled))
    if kept is not None:
        write_features(kept, vectors, labels)
    return Features(vectors, labels)


@contextmanager
def encode_images(
    encoder: FrozenEncoder,
    images: Dataset[Any],
    data: DataConfig,
    config: FrozenNetworkConfig,
    device: torch.device,
    layers: Sequence[int] = (),
    bandwidth: int | None = None,
) -> Iterator[Iterator[EncodedBatch]]:
    """Encode a dataset in its order, a batch at a time, under the watchdog; yield the batches.

    Args:
        encoder: encoder of any checkpoint; moved to `device`.
        images: samples that start with pixels [C H W], at a size that the encoder accepts.
        data: statistics of the images.
        config: batch size, workers, precision, and the watchdog's limit.
        device: device of the forward passes.
        layers: blocks whose tokens to return (see `encode_layers`); empty for the encoder's own
            features, so that L = 1.
        bandwidth: see `extract_dataset_features`.
    """
    dtype = autocast_dtype(config.precision, device)
    encoder.network.to(device).eval()
    alone = DistributedContext(0, 1, device)
    num_workers = worker_count(config.num_workers, alone)
    loader = data_loader(images, num_workers, batch_size=config.batch_size)

    @torch.no_grad()
    def encoded(batch: Sequence[Any]) -> EncodedBatch:
        pixels, *rest = batch
        pixels = normalise(pixels.to(device), data.mean, data.std)
        if bandwidth is not None:
            height, width = pixels.shape[-2:]
            scale = bandwidth / min(height, width)
            pixels = low_pass(pixels, (round(scale * height), round(scale * width)))
        with autocast(dtype, device):
            tokens = encode_layers(encoder, layers, pixels)
        if not torch.isfinite(tokens).all():
            raise UserError(
                "the encoder's features are not finite: its weights are damaged, or precision "
                f"{config.precision} overflows"
            )
        heartbeat()
        return EncodedBatch(tokens.float(), rest)

    with (
        hang_watchdog(config.step_timeout),
        compute_threads(num_workers, alone),
        batches_of(loader) as batches,
    ):
        heartbeat()
        yield map(encoded, batches)
