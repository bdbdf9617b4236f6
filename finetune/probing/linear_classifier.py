"""Linear probe on cached features: one pass over the images, then many learning rates at once.

MAE's recipe puts a BatchNorm without affine parameters before the linear layer; on cached features
this is standardisation by the training set. The learning rate is chosen on a held-out tenth of the
training images, never on the validation set; the head is then trained on all training images.

Shapes: N images, D width, C classes, R learning rates, B batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.checkpoints.layouts.mae import PROBE_EPSILON
from mae_et.monitoring.progress import Progress
from mae_et.probing.labelled import at_least_float32, check_features, check_splits, scale_of
from mae_et.runtime.console import notify

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTUM = 0.9
BATCH_SIZE = 256
HELD_OUT_FRACTION = 0.1
BLOCK = 4096  # rows of logits at a time: all of ImageNet's would not fit


class ProbeResult(NamedTuple):
    """Outcome of a linear probe."""

    accuracy: float
    """Top-1 on the validation set, in percent."""
    learning_rate: float
    """Learning rate that was chosen."""
    held_out_accuracy: float
    """Top-1 of that learning rate on the held-out training images, in percent."""


class LinearProbe(NamedTuple):
    """A trained linear classifier of features."""

    mean: Tensor
    """[D], of the training features."""
    std: Tensor
    """[D], likewise."""
    head: Tensor
    """[1 D+1 C], the bias last."""
    learning_rate: float
    """As in `ProbeResult`."""
    held_out_accuracy: float
    """Likewise."""

    def accuracy(self, val: tuple[Tensor, Tensor]) -> float:
        """Return the top-1 accuracy on features [N D] and labels [N], in percent."""
        features, labels = val
        check_features(features, labels, "val")
        every = torch.arange(len(features), device=features.device)
        return accuracies(self.head, features, labels, every, self.mean, self.std)[0].item()


def probe_features(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    epochs: int = 100,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear classifier on features, and return its top-1 accuracy on others.

    Works on the features' device without copying them, unless their scale is extreme or their
    precision half: additional memory is three times the heads' 6 (D + 1) C floats, and one batch.

    Args:
        train: features to train on, float [N D], and their labels, int64 [N] from 0; N of any size.
        val: features to score on, float [M D], and their labels, int64 [M].
        epochs: passes over the training features.
        seed: seed of the held-out split and of the batches.

    Returns:
        Accuracy in percent, the chosen learning rate and its held-out accuracy.

    Raises:
        ValueError: shapes or types do not fit, or a split is empty or has unlabelled images.

    Source: MAE's linear probe (arXiv 2111.06377, appendix A) with momentum SGD instead of LARS, on
    features of centre crops.
    """
    check_splits(train, val)
    probe = train_probe(train, epochs, seed)
    return ProbeResult(probe.accuracy(val), probe.learning_rate, probe.held_out_accuracy)


def train_probe(train: tuple[Tensor, Tensor], epochs: int, seed: int = 0) -> LinearProbe:
    """Train a linear classifier on features; see `probe_features`."""
    features, labels = train
    check_features(features, labels, "train")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    features = at_least_float32(features)
    mean, std = statistics_of(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    order = order.to(features.device)
    count = max(1, int(len(order) * HELD_OUT_FRACTION))
    held_out, rest = order[:count], order[count:] if len(order) > count else order
    heads = train_heads(features, labels, rest, mean, std, LEARNING_RATES, epochs, seed)
    scores = accuracies(heads, features, labels, held_out, mean, std)
    best = int(scores.argmax())
    rate = LEARNING_RATES[best]
    if bool((scores == scores[0]).all()):
        notify(
            f"linear probe: all learning rates score {scores[0]:.2f} % on the held-out training "
            f"images: {rate} is taken"
        )
    elif rate in (LEARNING_RATES[0], LEARNING_RATES[-1]):
        edge, beyond = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        notify(
            f"linear probe: the chosen learning rate {rate} is the {edge} of those tried: a "
            f"{beyond} one might score higher"
        )
    every = torch.arange(len(features), device=features.device)
    final = train_heads(features, labels, every, mean, std, (rate,), epochs, seed)
    return LinearProbe(mean, std, final, rate, scores[best].item())


def statistics_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation [D] that features [N D] are standardised with.

    The epsilon of MAE's batch norm is relative to the mean variance: the scale of the features does
    not change the probe.
    """
    scale = scale_of(features)
    scaled = features if scale == 1 else features / scale
    variance = scaled.var(dim=0, correction=0)
    epsilon = PROBE_EPSILON * variance.mean().clamp_min(PROBE_EPSILON)
    return scaled.mean(dim=0) * scale, (variance + epsilon).sqrt() * scale


def train_heads(
    features: Tensor,
    labels: Tensor,
    indices: Tensor,
    mean: Tensor,
    std: Tensor,
    learning_rates: tuple[float, ...],
    epochs: int,
    seed: int,
) -> Tensor:
    """Train a head for each of R learning rates with momentum SGD and a cosine schedule.

    Features [N D] are normalised by `mean` and `std` [D]; `indices` select those to train on. Heads
    share only their batches: the summed loss gives each head its own gradient. Returns [R D+1 C],
    the bias last.
    """
    device, classes = features.device, int(labels.max()) + 1
    heads = features.new_zeros(len(learning_rates), features.shape[1] + 1, classes)
    velocity = torch.zeros_like(heads)
    rates = torch.tensor(learning_rates, device=device)[:, None, None]
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same order on any device
    per_epoch = len(indices.split(batch_size_for(len(indices))))
    steps = epochs * per_epoch
    with Progress("linear probe", steps, unit="step") as progress:
        for step in range(steps):
            if step % per_epoch == 0:
                batches = shuffled_batches(indices, generator)
            batch = batches[step % per_epoch]
            x = F.pad((features[batch] - mean) / std, (0, 1), value=1.0)
            y = F.one_hot(labels[batch], classes)
            error = (x @ heads).softmax(dim=-1) - y  # [R B C], the gradient of cross-entropy
            gradient = x.T @ error / len(x)
            velocity = MOMENTUM * velocity + gradient
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            heads -= rates * cosine * velocity
            progress.advance(1)
    return heads


def batch_size_for(count: int) -> int:
    """Return the batch size for N images: N divided by N // 256, rounded up; 256 to 511."""
    return -(-count // max(1, count // BATCH_SIZE))


def shuffled_batches(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return an epoch's batches: each index once; only the last batch may be smaller."""
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    return indices[order].split(batch_size_for(len(indices)))


def accuracies(
    heads: Tensor, features: Tensor, labels: Tensor, indices: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    """Return the top-1 accuracy of each head on the images at `indices`, in percent, [R]."""
    correct = torch.zeros(len(heads), dtype=torch.int64, device=features.device)
    for batch in indices.split(BLOCK):
        logits = (features[batch] - mean) / std @ heads[:, :-1] + heads[:, -1:]
        correct += (logits.argmax(dim=-1) == labels[batch]).sum(dim=-1)
    return 100 * correct.float() / len(indices)
