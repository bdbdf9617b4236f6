"""Read a weight file (safetensors, or a torch archive) without executing anything in it."""

import argparse
import json
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mae_et.checkpoints.checksums import Damaged, check_archive, check_safetensors
from mae_et.errors import UserError

MODEL_KEY = "mae_et.model"
"""Entry of a safetensors file's metadata: the config (JSON) of the model whose encoder it holds."""


def read_weight_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a file: of names to tensors, or of a training checkpoint.

    Raises:
        UserError: the file cannot be read, or holds objects other than tensors and plain types.
    """
    try:
        with path.open("rb") as file:
            is_pickle = file.read(2) in {b"PK", b"\x80\x02"}
        if not is_pickle:
            return _read_safetensors(path)
        check_archive(path)
        # Training checkpoints of MAE carry their arguments; both classes are plain holders.
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Damaged as error:
        raise UserError(str(error)) from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {describe_refusal(error)}") from None
    except Exception as error:  # damaged files raise all kinds of errors
        raise UserError(f"{path} cannot be read: {summarise_error(error)}") from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}, not weights")
    return payload


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors, and the config of their model where the metadata has it."""
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        model = (file.metadata() or {}).get(MODEL_KEY)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {MODEL_KEY: json.loads(model), "model": tensors} if model else tensors


def describe_refusal(error: pickle.UnpicklingError) -> str:
    """Return why a file was not unpickled: the object in it that would have run code, if known."""
    named = re.search(r"(?:GLOBAL|class)\s+([\w.]+)", str(error))
    return f"it holds {named[1]}" if named else "it is not a plain file of tensors"


def summarise_error(error: Exception) -> str:
    """Return an error's type and the first sentence of its message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {re.split(r'[.] ', message)[0]}"
