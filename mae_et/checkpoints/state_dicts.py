"""State dicts: find one in any training checkpoint, check it, and compare it with a network's.

It is recognised by its parameter names, under any entries and prefixes (`state_dict`, `module.`).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_et.checkpoints.layouts.other_names import renamed_to_timm
from mae_et.errors import UserError, listed
from mae_et.runtime.console import notify

Tensors = dict[str, Tensor]

# Inserted in names by torch.compile, FSDP and activation checkpointing.
_INSERTED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)  # in names of moving averages
_QUANTISED = {torch.int8, torch.uint8, torch.int16, torch.int32}
_DEEPEST = 4  # levels of nested mappings; no known trainer stores weights deeper


def find_state_dict(
    path: Path, payload: dict[str, Any], names: Collection[str], key: str | None = None
) -> Tensors:
    """Find the state dict of a network in the content of a training checkpoint; empty if none is.

    Floating-point weights are returned as float32. If a file holds weights and their moving
    average, the average is returned, which is reported on stderr; tensors that it lacks (trainers
    often average parameters only) come from the weights. The only name may be one that no other
    network has. `key` is a part of the path to one of several state dicts, such as `teacher`.
    """
    mappings = list(_mappings(payload, ()))
    found = _candidates(mappings, names)
    chosen = [label for label in found if key is None or f".{key}." in f".{label}."]
    averages = [label for label in chosen if _EMA.search(label)]
    if len(averages) == 1 < len(chosen):
        return _average(path, found, averages[0], [each for each in chosen if each not in averages])
    if not chosen and key is None:
        return {}
    if len(chosen) != 1:
        choices = ", ".join(label or "(the file itself)" for label in found) or "no weights"
        cause = "several sets of weights" if chosen else f"nothing under {key!r}"
        raise UserError(f"{path} holds {cause}: choose one with checkpoint_key ({choices})")
    if not averages and (nameless := _nameless_average(payload)):
        notify(f"{path}: the moving average in {nameless} has no names and is not used")
    report_unread(path, _beside(mappings, found))
    return _as_float32(path, found[chosen[0]])


def _beside(mappings: list[tuple[Any, Tensors]], found: dict[str, Tensors]) -> list[str]:
    """Return the names of tensors that are part of no state dict, nor of an optimizer's state."""
    part = {id(tensor) for tensors in found.values() for tensor in tensors.values()}
    return [
        ".".join((*place, name))
        for place, tensors in mappings
        for name, each in tensors.items()
        if each.is_floating_point() and each.ndim and id(each) not in part
        if "optim" not in ".".join(place)
    ]


def largest_state_dict(path: Path, payload: dict[str, Any]) -> Tensors:
    """Return the largest mapping of tensors in a training checkpoint, whatever their names."""
    mappings = (tensors for _, tensors in _mappings(payload, ()))
    return _as_float32(path, max(mappings, key=len, default={}))


def tensor_names(payload: dict[str, Any]) -> list[str]:
    """Return the names of all tensors in a training checkpoint."""
    return [name for _, tensors in _mappings(payload, ()) for name in tensors]


def _average(path: Path, found: dict[str, Tensors], average: str, others: list[str]) -> Tensors:
    """Return a moving average, with the tensors that its modules lack from the weights."""
    tensors, weights = found[average], found[others[0]] if len(others) == 1 else {}
    modules = {name.rpartition(".")[0] for name in tensors}
    lacking = sorted(n for n in weights.keys() - tensors.keys() if n.rpartition(".")[0] in modules)
    unused = ", ".join(label or "the file itself" for label in others)
    rest = f"; it lacks {listed(lacking, 3)}, taken from {unused}" if lacking else ""
    notify(
        f"{path}: taking the moving average {average}, not {unused} (checkpoint_key chooses){rest}"
    )
    return _as_float32(path, {name: weights[name] for name in lacking} | tensors)


def _as_float32(path: Path, tensors: Tensors) -> Tensors:
    """Convert any floating-point format; refuse sparse and quantised weights."""
    converted = {}
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
        if not dense or tensor.is_complex() or tensor.device.type != "cpu":
            raise UserError(f"{path} holds sparse, complex or quantised weights ({name})")
        if tensor.dtype in _QUANTISED and tensor.ndim > 1:
            raise UserError(f"{path} holds quantised weights ({name}, {tensor.dtype})")
        converted[name] = tensor.float() if tensor.is_floating_point() else tensor
    return converted


def _nameless_average(payload: dict[Any, Any], place: tuple[str, ...] = ()) -> str | None:
    """Return the path to a moving average stored as a list of tensors, if there is one."""
    for name, value in payload.items():
        here = (*place, str(name))
        label = ".".join(here)
        if isinstance(value, dict) and len(here) <= _DEEPEST:
            label = _nameless_average(value, here) or ""
        elif not (isinstance(value, list | tuple) and isinstance(next(iter(value), None), Tensor)):
            continue
        if _EMA.search(label):
            return label
    return None


def _candidates(mappings: list[tuple[Any, Tensors]], names: Collection[str]) -> dict[str, Tensors]:
    """Return the state dicts that contain the names, keyed by their dotted paths."""
    found = {}
    for place, tensors in mappings:
        completed = Counter(prefix for name in tensors for prefix in _prefixes(name, names))
        for prefix, count in completed.items():
            if 2 * count > max(
                completed.values()
            ):  # fewer are chance: a block may share a name with the network
                label = ".".join((*place, *prefix.split(".")[:-1]))
                found[label] = _strip(tensors, prefix)
    return found


def _mappings(payload: dict[Any, Any], place: tuple[str, ...]) -> Iterator[tuple[Any, Tensors]]:
    """Yield each mapping of tensors with the path to it.

    Insertions of wrappers are removed from names, and other libraries' names become timm's.
    """
    tensors = {
        _INSERTED.sub("", name): torch.as_tensor(value)
        for name, value in payload.items()
        if isinstance(name, str) and (isinstance(value, Tensor) or _is_array(value))
    }
    if tensors:
        renamed = renamed_to_timm(tensors)
        yield place, {renamed[name]: tensor for name, tensor in tensors.items()}
    if len(place) < _DEEPEST:
        for name, value in payload.items():
            if isinstance(name, str) and isinstance(value, dict):
                yield from _mappings(value, (*place, name))


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "fi"


def _prefixes(name: str, names: Collection[str]) -> Iterator[str]:
    """Yield each prefix that precedes one of the names in a longer name."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    yield from (name[:start] for start in starts if name[start:] in names)


def _strip(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors under a prefix, and the decoder beside them under MAE's names.

    Our models have `encoder.` and `decoder.`; solo-learn's `backbone.`, lightly's `backbone.vit.`
    beside a `decoder.` whose names are MAE's.
    """
    stripped = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    parts = prefix.split(".")[:-1]
    for parent in (parts[:-1], parts[:-2]):
        decoder = ".".join([*parent, "decoder."])
        if prefix and {f"{decoder}embed.weight", f"{decoder}decoder_embed.weight"} & tensors.keys():
            for name in (name for name in tensors if name.startswith(decoder)):
                own = name.removeprefix(decoder)
                known = own == "mask_token" or own.startswith("decoder_")
                stripped[own if known else f"decoder_{own}"] = tensors[name]
    return stripped


def describe_mismatch(
    weights: Tensors,
    expected: Tensors,
    may_lack: tuple[str, ...] = (),
    may_have: tuple[str, ...] = (),
) -> str:
    """Describe how weights differ from a network's: the number of each kind, and up to five names.

    The weights need not have names with the prefixes `may_lack`, nor the network those with
    `may_have`. Returns a part of a sentence; empty where all fit.
    """
    common = [name for name in expected if name in weights]
    kinds = {
        "missing": [n for n in expected if n not in weights and not n.startswith(may_lack)],
        "unexpected": [n for n in weights if n not in expected and not n.startswith(may_have)],
        "misshapen": [
            f"{name} is {list(weights[name].shape)}, not {list(expected[name].shape)}"
            for name in common
            if weights[name].shape != expected[name].shape
        ],
        "of another type": [
            f"{name} is {weights[name].dtype}"
            for name in common
            if expected[name].is_floating_point() > weights[name].is_floating_point()
        ],
    }
    return "; ".join(
        f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names
    )


def check_finite(path: Path, tensors: Tensors, read: Iterable[str]) -> None:
    """Refuse tensors with infinities or NaN, among those whose names are `read`.

    Others may have them on purpose, as the mask of CLIP's text tower.
    """
    for name in read:
        if name in tensors and not tensors[name].isfinite().all():
            raise UserError(f"{path} holds weights that are not finite numbers ({name})")


def report_unread(path: Path, names: Sequence[str]) -> None:
    """Report tensors that are not read, in one line with their number."""
    if names:
        notify(f"{path}: tensors that are not read: {len(names)} ({listed(names, 3)})")


def depth_of(weights: Tensors) -> int:
    """Return the number of blocks of an encoder or a decoder."""
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
