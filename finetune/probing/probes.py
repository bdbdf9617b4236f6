"""kNN and linear probe accuracy of a frozen encoder, trained or freshly initialised."""

from typing import Any

import torch

from finetune.image_size import format_size
from finetune.probing.features import extract_dataset_features
from finetune.probing.frozen_encoder import FrozenEncoder, open_encoder_and_data
from finetune.probing.linear_classifier import probe_features
from finetune.probing.pooled_backbone import PooledBackbone
from finetune.provenance import changed_settings, digest_of_weights, inputs_of, origin_of
from finetune.run_folder import check_scores_folder
from finetune.scoring_config import ProbeConfig, notify_scoring
from mae_et.config.data import STATISTICS, DataConfig
from mae_et.config.typed import typed
from mae_et.io.score_records import RESULTS, write_record
from mae_et.monitoring.figures import standard_error
from mae_et.probing.nearest_neighbours import knn_accuracy
from mae_et.runtime import distributed
from mae_et.runtime.console import say

POOLS = {"mean": "mean of the patch tokens", "cls": "class token"}


def knn(config: ProbeConfig) -> dict[str, Any]:
    """Return the encoder's kNN accuracy, in percent; see `score_encoder`."""
    return score_encoder(config, linear=False)


def linear_probe(config: ProbeConfig) -> dict[str, Any]:
    """Return the encoder's linear probe accuracy, in percent; see `score_encoder`."""
    return score_encoder(config, neighbours=False)


def score_encoder(
    config: ProbeConfig, neighbours: bool = True, linear: bool = True
) -> dict[str, Any]:
    """Score a frozen encoder by kNN and by a linear probe.

    Scores are also written to `config.output`, which defaults to a folder of a finished run.

    Returns:
        `data`, the name of the data; `settings`, if any differ from the defaults; `knn` and
        `linear`, top-1 in percent, each with its `..._standard_error`; `linear_learning_rate`, the
        chosen one; the same with the prefix `untrained_` if the config requests them; and
        `provenance`: checkpoint, weights, numbers of images and all settings.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    config = typed(config, ProbeConfig)
    if config.output is not None:
        check_scores_folder(config.output)
    encoder, data = open_encoder_and_data(config)
    results: dict[str, Any] = {"data": str(data.root or data.source)}
    results |= _settings(config, encoder, data, neighbours, linear)
    digest = digest_of_weights(encoder.network)
    notify_scoring(config.checkpoint, data)
    pooled = isinstance(encoder.network, PooledBackbone)
    feature = "pooled by the network" if pooled else POOLS[config.pool]
    say(f"features: {feature}, images of {format_size(encoder.image_size)} pixels")
    scores, images = _score(encoder, data, config, neighbours, linear)
    results |= scores
    if config.untrained:
        torch.manual_seed(config.seed)
        encoder.initialise()
        fresh, _ = _score(encoder, data, config, neighbours, linear)
        results |= {f"untrained_{name}": value for name, value in fresh.items()}
    results["provenance"] = {
        **origin_of(config.checkpoint),
        **inputs_of(digest, data, encoder.image_size, config),
        **images,
        **{key: getattr(config, key) for key in [*_keys(neighbours, linear), "seed"]},
    }
    kind = "probes" if neighbours and linear else "knn" if neighbours else "linear-probe"
    _write(results, config, kind)
    return results


def _settings(
    config: ProbeConfig, encoder: FrozenEncoder, data: DataConfig, neighbours: bool, linear: bool
) -> dict[str, str]:
    """Name the settings that differ from the defaults, if any."""
    default, own = ProbeConfig(config.checkpoint), encoder.data or encoder.preprocessing or data
    sources: list[tuple[str, Any, Any]] = [
        (key, config, default) for key in _keys(neighbours, linear)
    ]
    sources += [(key, data, own) for key in STATISTICS]
    changed = [(key, getattr(now, key), getattr(usual, key)) for key, now, usual in sources]
    size = config.image_size if encoder.resized else None
    changed += [("image_size", size, None), ("max_images", config.max_images, None)]
    return changed_settings(changed)


def _keys(neighbours: bool, linear: bool) -> list[str]:
    """Return the keys of the config that the scores depend on."""
    return ["pool"] + ["neighbours", "temperature"] * neighbours + ["epochs"] * linear


def _write(results: dict[str, Any], config: ProbeConfig, kind: str) -> None:
    """Write a record to the output folder, by default inside the folder of a finished run."""
    folder = config.output
    if folder is None and (config.checkpoint / RESULTS).is_file():
        folder = config.checkpoint / kind
    if folder is None:
        return
    path = folder / RESULTS
    try:
        others = write_record(folder, results)
    except OSError as error:
        if config.output is not None:
            raise
        say(f"scores are only printed, {path} cannot be written: {error.strerror}")
    else:
        kept = f"; {others} of other data, settings or weights are kept beside it" if others else ""
        say(f"scores written to {path}{kept}")


def _score(
    encoder: FrozenEncoder, data: DataConfig, config: ProbeConfig, neighbours: bool, linear: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the scores, and the numbers of images."""
    device = distributed.choose_device(config.device)
    train, val = (
        extract_dataset_features(
            encoder, data, config, split, device, max_images=config.max_images
        ).to(device)
        for split in ("train", "val")
    )
    unseen = ~torch.isin(val.labels, train.labels)
    if unseen.any():
        say(
            f"{int(unseen.sum())} of {len(unseen)} validation images are of classes without a "
            "training image, and count as wrong"
        )
    results: dict[str, Any] = {}
    if neighbours:
        if config.neighbours > len(train[0]):
            say(f"neighbours {config.neighbours}: all {len(train[0])} training images vote")
        accuracy = knn_accuracy(train, val, config.neighbours, config.temperature)
        results |= _with_error("knn", accuracy, len(val.labels))
    if linear:
        probe = probe_features(train, val, config.epochs, config.seed)
        results |= _with_error("linear", probe.accuracy, len(val.labels))
        results["linear_learning_rate"] = probe.learning_rate
    return results, {"train_images": len(train.labels), "val_images": len(val.labels)}


def _with_error(key: str, accuracy: float, images: int) -> dict[str, float]:
    error = standard_error(accuracy, images)
    return {key: round(accuracy, 2), f"{key}_standard_error": round(error, 2)}
