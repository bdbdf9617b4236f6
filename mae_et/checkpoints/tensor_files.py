"""Write tensors for other libraries."""

from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from mae_et.checkpoints.state_dicts import Tensors
from mae_et.io.atomic import write_atomically


def write_safetensors(weights: Tensors, path: Path, entries: dict[str, str] | None = None) -> None:
    """Write tensors, and entries of ours to the metadata, which other readers skip."""
    content = safetensors_bytes(_contiguous(weights), {"format": "pt"} | (entries or {}))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_torch(weights: Tensors, path: Path, entries: dict[str, str]) -> None:
    """Write tensors under `model`, and entries of ours beside them."""
    payload = {"model": _contiguous(weights), **entries}
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def _contiguous(weights: Tensors) -> Tensors:
    """Return tensors that share no memory, as files need them."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
