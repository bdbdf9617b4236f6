"""State dicts: find one in a training checkpoint, and compare it with a network's."""

from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]

# A training checkpoint wraps its weights in one of these.
WRAPPERS = ("model", "state_dict", "module", "state_dict_ema", "model_ema")


def unwrap(payload: dict[str, Any]) -> Tensors:
    """Find the state dict in a training checkpoint, and strip DDP's prefix."""
    for name in WRAPPERS:
        if isinstance(payload.get(name), dict):
            payload = payload[name]
            break
    return {
        name.removeprefix("module."): tensor
        for name, tensor in payload.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def describe_mismatch(
    weights: Tensors,
    expected: Tensors,
    may_lack: tuple[str, ...] = (),
    may_have: tuple[str, ...] = (),
) -> str:
    """Describe how weights differ from a network's: the number of each kind, and up to five names.

    Args:
        weights: tensors to load, of any shapes.
        expected: the network's state dict.
        may_lack: prefixes of names that the weights need not have.
        may_have: prefixes of names that the network need not have.

    Returns:
        Missing, unexpected and misshapen tensors, as part of a sentence; empty where all fit.
    """
    kinds = {
        "missing": [n for n in expected if n not in weights and not n.startswith(may_lack)],
        "unexpected": [n for n in weights if n not in expected and not n.startswith(may_have)],
        "misshapen": [
            f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    )


def depth_of(weights: Tensors) -> int:
    """Return the number of blocks of an encoder or a decoder."""
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
