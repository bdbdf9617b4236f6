"""kNN and linear probe accuracy of a frozen encoder, trained or freshly initialised."""

from typing import Any

import torch

from finetune.features import extract_dataset_features
from finetune.frozen_encoder import FrozenEncoder, open_encoder_and_data
from finetune.linear_classifier import probe_features
from finetune.run_folder import check_scores_folder
from finetune.scoring_config import ProbeConfig, notify_scoring
from mae_et.config.data import STATISTICS, DataConfig
from mae_et.config.typed import typed
from mae_et.io.score_records import RESULTS, write_record
from mae_et.probing.nearest_neighbours import knn_accuracy
from mae_et.runtime import distributed
from mae_et.runtime.console import say


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
        `linear`, top-1 in percent; `linear_learning_rate`, the chosen one; and the same with the
        prefix `untrained_` if the config requests them.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    config = typed(config, ProbeConfig)
    if config.output is not None:
        check_scores_folder(config.output)
    encoder, data = open_encoder_and_data(config)
    results = {"data": str(data.root or data.source)}
    results |= _settings(config, encoder, data, neighbours, linear)
    notify_scoring(config.checkpoint, data)
    results |= _score(encoder, data, config, neighbours, linear)
    if config.untrained:
        torch.manual_seed(config.seed)
        encoder.initialise()
        fresh = _score(encoder, data, config, neighbours, linear)
        results |= {f"untrained_{name}": value for name, value in fresh.items()}
    kind = "probes" if neighbours and linear else "knn" if neighbours else "linear-probe"
    _write(results, config, kind)
    return results


def _settings(
    config: ProbeConfig, encoder: FrozenEncoder, data: DataConfig, neighbours: bool, linear: bool
) -> dict[str, str]:
    """Name the settings that differ from the defaults, which make scores incomparable."""
    keys = ["pool"] + ["neighbours", "temperature"] * neighbours + ["epochs"] * linear
    statistics = STATISTICS if encoder.data is not None else ()
    changed = [
        f"{key}={getattr(given, key)}".replace(" ", "")
        for chosen, given, default in (
            (keys, config, ProbeConfig(config.checkpoint)), (statistics, data, encoder.data),
        )
        for key in chosen
        if getattr(given, key) != getattr(default, key)
    ]  # fmt: skip
    return {"settings": ",".join(changed)} if changed else {}


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
) -> dict[str, Any]:
    device = distributed.choose_device(config.device)
    train, val = (
        extract_dataset_features(encoder, data, config, split, device).to(device)
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
        results["knn"] = round(accuracy, 2)
    if linear:
        probe = probe_features(train, val, config.epochs, config.seed)
        results["linear"] = round(probe.accuracy, 2)
        results["linear_learning_rate"] = probe.learning_rate
    return results
