"""Keep the features of a split in a file, so that the next score of it encodes no image."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.probing.frozen_encoder import FrozenEncoder
from finetune.provenance import digest_of_weights, inputs_of
from finetune.scoring_config import FeatureScoreConfig
from mae_et.checkpoints.checksums import sha256_of_tensors
from mae_et.config.data import DataConfig
from mae_et.data.datasets import ImageDataset
from mae_et.data.fingerprint import fingerprint_with_contents
from mae_et.errors import one_line
from mae_et.io.atomic import refuse_unwritable, write_atomically
from mae_et.runtime.agreement import code_version
from mae_et.runtime.console import say


def feature_file(
    encoder: FrozenEncoder, source: ImageDataset, data: DataConfig, config: FeatureScoreConfig,
    device: torch.device, indices: Sequence[int], bandwidth: int | None,
) -> Path | None:  # fmt: skip
    """Return the file of features in `config.feature_cache`; None without such a folder.

    It is named after all that they depend on: weights, images, settings, GPU and code.
    """
    if config.feature_cache is None:
        return None
    facts = {
        **inputs_of(digest_of_weights(encoder.network), data, encoder.image_size, config),
        **code_version("finetune"),
        "images": fingerprint_with_contents(source),
        "indices": hashlib.sha256(repr(list(indices)).encode()).hexdigest(),
        "bandwidth": bandwidth,
        "pool": config.pool,
        "batch_size": config.batch_size,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return config.feature_cache / f"{digest[:16]}.safetensors"


def read_features(path: Path) -> dict[str, Tensor] | None:
    """Return `vectors` and `labels` of a file; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            features = {name: file.get_tensor(name) for name in ("vectors", "labels")}
            if (file.metadata() or {}).get("sha256") != sha256_of_tensors(features):
                raise ValueError("its checksum does not match")
    except (OSError, SafetensorError, ValueError) as error:
        say(f"{path} is damaged, and computed again: {one_line(error)}")
        return None
    say(f"features of {len(features['labels']):,} images read from {path}")
    return features


def write_features(path: Path, vectors: Tensor, labels: Tensor) -> None:
    """Write the features [N D] and labels [N] of a split, with a checksum."""
    features = {"vectors": vectors, "labels": labels}
    about = {"sha256": sha256_of_tensors(features)}
    with refuse_unwritable(f"feature_cache {path.parent}"):
        write_atomically(path, lambda temporary: save_file(features, temporary, about))
    say(f"features of {len(labels):,} images kept in {path}")
