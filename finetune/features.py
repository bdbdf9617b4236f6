"""Features of a frozen encoder, computed once for a whole data set.

N images, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from finetune.config import Pool
from finetune.datasets import open_labelled
from finetune.scoring_config import ProbeConfig
from mae_et.config.schema import DataConfig, check_statistics
from mae_et.curriculum.frequency import low_pass
from mae_et.data.layout import Split
from mae_et.data.loader import batches_of, eval_loader, worker_count
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.models.mae import MaskedAutoencoder
from mae_et.runtime.precision import autocast, autocast_dtype


class Features(NamedTuple):
    """Features of a data set."""

    vectors: Tensor
    """float32 [N D]."""
    labels: Tensor
    """int64 [N]."""
    classes: int
    """Number of classes."""

    def to(self, device: torch.device) -> "Features":
        """Return the features on a device."""
        return Features(self.vectors.to(device), self.labels.to(device), self.classes)


@torch.no_grad()
def extract_dataset_features(
    model: MaskedAutoencoder,
    data: DataConfig,
    config: ProbeConfig,
    split: Split,
    device: torch.device,
    chosen: Sequence[int] | None = None,
    bandwidth: int | None = None,
) -> Features:
    """Encode a split's central views at the model's base size, nothing masked.

    Args:
        model: its encoder is taken.
        data: the data set.
        config: how.
        split: the split.
        device: where.
        chosen: images that are encoded, in this order; all by default.
        bandwidth: low frequencies that the images keep, at their full size; all by default.

    Raises:
        UserError: images have no labels, or none of more than one class.
    """
    check_statistics(data, model.channels)
    source = open_labelled(data, split, model.channels, "scoring an encoder")
    view: Dataset[tuple[Tensor, int]] = EvalDataset(source, data, model.full[0] * model.patch)
    if chosen is not None:
        view = Subset(view, chosen)
    dtype = autocast_dtype(config.precision, device)
    model = model.to(device).eval()
    vectors, labels = [], []
    with batches_of(
        eval_loader(view, config.batch_size, worker_count(config.num_workers))
    ) as batches:
        for images, batch_labels in batches:
            pixels = normalise(images.to(device), data.mean, data.std)
            if bandwidth is not None:
                pixels = low_pass(pixels, bandwidth)
            with autocast(dtype, device):
                tokens = model.encode(pixels)
            vectors.append(pool(tokens.float(), config.pool).cpu())
            labels.append(batch_labels)
    return Features(torch.cat(vectors), torch.cat(labels), len(source.classes))


def pool(tokens: Tensor, how: Pool) -> Tensor:
    """[B 1+N D] class and patch tokens -> [B D]."""
    return tokens[:, 0] if how == "cls" else tokens[:, 1:].mean(dim=1)
