"""Linear probe on cached features: one pass over the images, then many learning rates at once.

As in MAE's recipe a BatchNorm without affine comes before the linear layer; on cached features it
is their standardisation by the training set. The learning rate is chosen on a tenth of the training
images that is held out, never on the validation set; the head is then trained on all of them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.features import Features
from mae_et.checkpoints.formats import PROBE_EPSILON

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTUM = 0.9
BATCH = 256
HELD_OUT = 0.1


class ProbeResult(NamedTuple):
    """What a linear probe found."""

    accuracy: float
    """Top-1 on the validation set, in percent."""
    learning_rate: float
    """The one that was chosen."""
    held_out_accuracy: float
    """Top-1 of the choice on the held-out training images, in percent."""


class Probe(NamedTuple):
    """A trained linear classifier of features, and how its learning rate was chosen."""

    mean: Tensor
    """[D] of the training features."""
    deviation: Tensor
    """[D]."""
    head: Tensor
    """[1 D+1 classes], the bias last."""
    learning_rate: float
    held_out_accuracy: float

    def accuracy(self, judged: Features) -> float:
        """Return its top-1 on other features, in percent."""
        inputs = (judged.vectors - self.mean) / self.deviation
        return accuracies(self.head, inputs, judged.labels)[0].item()


def probe_features(train: Features, val: Features, epochs: int = 100, seed: int = 0) -> ProbeResult:
    """Train a linear classifier on features and score it, where the features are.

    Args:
        train: features to train on.
        val: features to score on.
        epochs: passes over the training features.
        seed: of the split and the batches.
    """
    probe = train_probe(train, epochs, seed)
    return ProbeResult(probe.accuracy(val), probe.learning_rate, probe.held_out_accuracy)


def train_probe(train: Features, epochs: int = 100, seed: int = 0) -> Probe:
    """Train a linear classifier on features; see `probe_features`."""
    mean, variance = train.vectors.mean(0), train.vectors.var(0, correction=0)
    deviation = (variance + PROBE_EPSILON).sqrt()
    inputs = (train.vectors - mean) / deviation
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    count = max(1, int(len(order) * HELD_OUT))
    held_out, rest = order[:count], order[count:]
    heads = train_heads(
        inputs[rest], train.labels[rest], train.classes, LEARNING_RATES, epochs, seed
    )
    scores = accuracies(heads, inputs[held_out], train.labels[held_out])
    best = int(scores.argmax())
    rate = LEARNING_RATES[best]
    final = train_heads(inputs, train.labels, train.classes, (rate,), epochs, seed)
    return Probe(mean, deviation, final, rate, scores[best].item())


def train_heads(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    learning_rates: tuple[float, ...],
    epochs: int,
    seed: int,
) -> Tensor:
    """Train a head for each of R learning rates with momentum SGD and a cosine.

    Heads share the batches and nothing else: the gradient of the summed loss is each head's own.

    Returns:
        [R D+1 classes], the bias last.
    """
    device = inputs.device
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, device=device)], dim=1)
    heads = torch.zeros(len(learning_rates), inputs.shape[1], classes, device=device)
    velocity = torch.zeros_like(heads)
    rates = torch.tensor(learning_rates, device=device)[:, None, None]
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same order on any device
    batches = max(1, len(inputs) // BATCH)
    for step in range(epochs * batches):
        if step % batches == 0:
            chunks = torch.randperm(len(inputs), generator=generator).to(device).chunk(batches)
        chosen = chunks[step % batches]
        x, y = inputs[chosen], F.one_hot(labels[chosen], classes)
        error = (x @ heads).softmax(dim=-1) - y  # [R B classes], cross-entropy's own gradient
        gradient = x.T @ error / len(x)
        velocity = MOMENTUM * velocity + gradient
        cosine = 0.5 * (1 + math.cos(math.pi * step / (epochs * batches)))
        heads -= rates * cosine * velocity
    return heads


def accuracies(heads: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return each head's top-1, in percent, [R]."""
    logits = inputs @ heads[:, :-1] + heads[:, -1:]
    return 100 * (logits.argmax(dim=-1) == labels).float().mean(dim=-1)
