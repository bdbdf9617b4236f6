"""Write tensors for other libraries: equal tensors and entries give equal bytes."""

import io
from pathlib import Path

import torch
from torch import nn

from mae_et.checkpoints.checksums import sealed_safetensors
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.state_dicts import Tensors
from mae_et.checkpoints.weights import Weights
from mae_et.config.model import ModelConfig
from mae_et.io.atomic import write_atomically


def write_safetensors(weights: Tensors, path: Path, entries: dict[str, str] | None = None) -> None:
    """Write tensors, with our own entries in the metadata, which other readers skip."""
    content = sealed_safetensors(_contiguous(weights), {"format": "pt"} | (entries or {}))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def export_encoder(
    encoder: nn.Module,
    path: Path,
    model: ModelConfig,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write an encoder as safetensors with timm's names; plain timm loads it strictly.

    The metadata hold the model's config and the images' preprocessing (JSON), and a checksum.
    """
    weights = Weights(path, encoder.state_dict(), model=model, preprocessing=preprocessing)
    write_safetensors(weights.encoder, path, weights.entries())


def write_torch(weights: Tensors, path: Path, entries: dict[str, str]) -> None:
    """Write tensors under `model`, with our own entries beside them."""
    payload = {"model": _contiguous(weights), **entries}
    file = io.BytesIO()
    torch.save(payload, file)  # saved to a path, the archive would contain the path's name
    write_atomically(path, lambda temporary: temporary.write_bytes(file.getvalue()))


def _contiguous(weights: Tensors) -> Tensors:
    """Return contiguous copies that share no memory, as safetensors requires."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
