"""Show a sample of a feature file in TensorBoard's embedding projector."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Subset

from finetune.embedding.images import FeatureImages, Part
from finetune.feature_config import EmbedConfig
from mae_et.config.data import DataConfig
from mae_et.data.batch import in_one_dtype
from mae_et.data.cores import worker_count
from mae_et.data.evenly_spaced import evenly_spaced
from mae_et.data.loader import batches_of, data_loader
from mae_et.monitoring.projector import write_projector

POINTS = 5000
"""Maximum number of points, the limit of TensorBoard's UMAP."""
THUMBNAIL = 32
"""Side of a thumbnail, in pixels."""


def show_in_projector(
    folder: Path,
    config: EmbedConfig,
    data: DataConfig,
    parts: Sequence[Part],
    channels: int,
    unreadable: Sequence[int],
) -> int:
    """Write at most `POINTS` features of `config.output` to a log directory for TensorBoard.

    The rows are evenly spaced and readable; points have names, classes and thumbnails. Their number
    is returned.
    """
    images = FeatureImages(parts, data, THUMBNAIL, channels)
    readable = np.setdiff1d(np.arange(len(images)), unreadable)
    chosen = readable[evenly_spaced(len(readable), POINTS)]
    pixels, labels = [], []
    workers = worker_count(config.num_workers)
    loader = data_loader(Subset(images, chosen.tolist()), workers, batch_size=config.batch_size)
    with batches_of(loader) as batches:
        for batch, batch_labels in batches:
            pixels.append(batch)
            labels += batch_labels.tolist()
    names = [name for part in parts for name in part.names(data)]
    classes = parts[0].source.classes
    rows = [
        (names[index], classes[label] if 0 <= label < len(classes) else str(label))
        for index, label in zip(chosen, labels, strict=True)
    ]
    vectors = read_features(config.output, chosen)
    write_projector(folder, vectors, rows, torch.cat(in_one_dtype(pixels)))
    return len(chosen)


def read_features(path: Path, indices: np.ndarray) -> np.ndarray:
    """Return the rows [K D] of a feature file at ascending indices."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)[indices]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            rows = file.get_slice("features")
            return np.concatenate([rows[index : index + 1] for index in indices.tolist()])
    import pyarrow.parquet as pq

    found, start = [], 0
    for group in pq.ParquetFile(path).iter_batches(columns=["features"]):
        part = np.stack(group["features"].to_numpy(zero_copy_only=False))
        found.append(part[indices[(indices >= start) & (indices < start + len(part))] - start])
        start += len(part)
    return np.concatenate(found)
