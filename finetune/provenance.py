"""What a file of scores or features was computed from: checkpoint, weights, images, settings.

`results.json` of knn, linear-probe and evaluate holds it as `provenance`, and the description of a
feature file among its keys.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.image_size import Size, height_and_width
from mae_et.checkpoints.checksums import sha256_of_tensors
from mae_et.config.data import DataConfig
from mae_et.config.efficiency import ProcessConfig
from mae_et.runtime.distributed import choose_device
from mae_et.runtime.precision import autocast_dtype
from mae_et.version import __version__


def origin_of(checkpoint: Path) -> dict[str, Any]:
    """Return the version that computed a file, and the checkpoint: an absolute path, or a name."""
    known = checkpoint.resolve() if checkpoint.exists() else checkpoint
    return {"version": __version__, "checkpoint": str(known)}


def digest_of_weights(network: nn.Module) -> str:
    """Return 16 digits of the SHA-256 of a network's tensors, whatever file they came from."""
    return sha256_of_tensors(dict(sorted(network.state_dict().items())))[:16]


def inputs_of(
    digest: str, data: DataConfig, image_size: Size, process: ProcessConfig
) -> dict[str, Any]:
    """Return the weights' digest and the resolved settings that determine a network's outputs."""
    device = choose_device(process.device)
    precision = autocast_dtype(process.precision, device)
    return {
        "weights": digest,
        "image_size": list(height_and_width(image_size)),
        "mean": list(data.mean),
        "std": list(data.std),
        "eval_crop": data.eval_crop,
        "max_value": data.max_value,
        "precision": str(precision or torch.float32).removeprefix("torch."),
        "device": device.type,
    }


def changed_settings(settings: Iterable[tuple[str, Any, Any]]) -> dict[str, str]:
    """Name the settings, given as key, value and default, that differ from their defaults.

    Such scores are not comparable to others. Empty if none differs, else `pool=cls,neighbours=5`.
    """
    changed = [f"{key}={now}".replace(" ", "") for key, now, default in settings if now != default]
    return {"settings": ",".join(changed)} if changed else {}
