"""Read a weight file (safetensors, or a torch archive) without executing anything in it."""

import argparse
import datetime
import pathlib
import pickle
import re
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from mae_et.checkpoints.checksums import Damaged, check_archive, check_safetensors, is_cut_short
from mae_et.errors import UserError, listed, one_line

# Entries (JSON) of a safetensors file's metadata, and of a torch archive beside its weights.
MODEL_KEY = "mae_et.model"
"""Config of the masked autoencoder."""
CLASSIFIER_KEY = "mae_et.classifier"
"""Classes, heads and grid of a classifier, as in its run's `classes.json`."""
PREPROCESSING_KEY = "mae_et.preprocessing"
"""Statistics and sizes of the images; see `Preprocessing`."""
SETTINGS_KEY = "mae_et.settings"
"""Heads, target and epsilon of weights from other sources, if known."""
OUR_ENTRIES = (MODEL_KEY, CLASSIFIER_KEY, PREPROCESSING_KEY, SETTINGS_KEY)


class _Skipped:
    """Stand-in for an object that is not read: accepts and drops any arguments and state."""

    def __new__(cls, *_: object) -> "_Skipped":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


# Modules whose objects trainers store beside weights: settings, histories, states of their loops.
SKIPPED_MODULES = ("mmengine.", "omegaconf.", "typing.", "lightning.", "lightning_fabric.",
                   "pytorch_lightning.", "deepspeed.")  # fmt: skip
_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
# Types that trainers save beside tensors: arguments, NumPy scalars, histories. All are plain data
# holders: constructing one runs no code from the file. torch fills only dicts and lists.
PLAIN_TYPES: list[Any] = [
    argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, pathlib.PurePosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"), (lambda *_: {}, "collections.defaultdict"),
    (lambda *_: [], "collections.deque"), datetime.datetime, datetime.date, datetime.timedelta,
    dict, list, set, tuple, int, float, str,
    np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.sctypeDict.values()},
    *((function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
      for function, name in ((_RECONSTRUCT, "_reconstruct"), (_SCALAR, "scalar"))),
]  # fmt: skip


def read_weight_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a file: of names to tensors, or of a training checkpoint.

    Raises:
        UserError: the file cannot be read, or holds objects other than tensors and plain types.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        if start[8:] == b"{" or not start.startswith((b"PK", b"\x80")):
            return _read_safetensors(path)
        check_archive(path)
        with torch.serialization.safe_globals([*PLAIN_TYPES, *_skipped_in(path)]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Damaged as error:
        raise UserError(str(error)) from None
    except pickle.UnpicklingError as error:
        advice = "save its state_dict alone"
        raise UserError(f"{path} is refused: {describe_refusal(error)}; {advice}") from None
    except Exception as error:  # damaged files raise all kinds of errors
        raise UserError(f"{path} cannot be read: {_what_is_wrong(path, start, error)}") from error
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}, not weights")
    return payload


def _skipped_in(path: Path) -> list[Any]:
    """Return a stand-in for each class of `SKIPPED_MODULES` that a file names, under its name.

    torch can list the classes that an archive names, but not those of the legacy format.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, ValueError):  # loading reports what is wrong, if anything
        return []
    return [(_Skipped, name) for name in names if name.startswith(SKIPPED_MODULES)]


def _what_is_wrong(path: Path, start: bytes, error: Exception) -> str:
    """Describe what is wrong with a file from its first 9 bytes and the error of reading it."""
    if not start:
        return "it is empty"
    if start.startswith(b"PK") and (archive := _what_archive(path)):
        return archive
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or tarfile.is_tarfile(path):
        return "it is an archive: unpack it"
    if not start.startswith((b"PK", b"\x80")) and (start[8:] != b"{" or b"\0" not in start):
        return "it is neither a safetensors file nor one of PyTorch"
    if isinstance(error, EOFError) or is_cut_short(path):
        return "it is cut short"
    return f"it is damaged ({summarise_error(error)})"


def _what_archive(path: Path) -> str:
    """Describe a zip archive that `torch.save` did not write; empty if it did."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # its directory is damaged
        return ""
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript archive: save the state_dict of its module"
    if not names or any(name.endswith("/data.pkl") for name in names):
        return ""
    return f"it is an archive of {listed(names, 3)}: unpack it, or convert it to PyTorch"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors, with our own metadata entries beside them."""
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        ours = {k: v for k, v in (file.metadata() or {}).items() if k in OUR_ENTRIES}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {**ours, "model": tensors} if ours else tensors


def describe_refusal(error: pickle.UnpicklingError) -> str:
    """Return why a file was not unpickled: the object in it that would have run code, if known."""
    named = re.search(r"(?:GLOBAL|class)\s+([\w.]+)", str(error))
    return f"it holds {named[1]}" if named else "it is not a plain file of tensors"


def summarise_error(error: Exception) -> str:
    """Return an error's type and the first sentence of its message, on one line."""
    return f"{type(error).__name__}: {re.split(r'[.] ', one_line(error))[0]}"
