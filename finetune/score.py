"""kNN and linear accuracy of an encoder, and of the same encoder untrained."""

import dataclasses
from typing import Any

import torch

from finetune.features import ProbeConfig, extract_features
from finetune.knn import knn_accuracy
from finetune.linear_probe import linear_probe
from mae_et import distributed
from mae_et.model import MaskedAutoencoder, initialise
from mae_et.pretrained import load_pretrained


def score_encoder(config: ProbeConfig, knn: bool = True, linear: bool = True) -> dict[str, Any]:
    """Return accuracies in percent: `knn`, `linear`, and `untrained_*` of them where asked for.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    model = load_pretrained(config.checkpoint, config.encoder_heads, config.decoder_heads)
    results = _score(model, config, knn, linear)
    if config.untrained:
        torch.manual_seed(config.seed)
        initialise(model)
        fresh = _score(model, dataclasses.replace(config), knn, linear)
        results |= {f"untrained_{name}": value for name, value in fresh.items()}
    return results


def _score(
    model: MaskedAutoencoder, config: ProbeConfig, knn: bool, linear: bool
) -> dict[str, Any]:
    device = distributed.choose_device(config.device)
    train, val = (extract_features(model, config, split, device) for split in ("train", "val"))
    results: dict[str, Any] = {}
    if knn:
        accuracy = knn_accuracy(train, val, config.neighbours, config.temperature)
        results["knn"] = round(accuracy, 2)
    if linear:
        probe = linear_probe(train, val, config.epochs, config.seed)
        results["linear"] = round(probe.accuracy, 2)
        results["linear_learning_rate"] = probe.learning_rate
    return results
