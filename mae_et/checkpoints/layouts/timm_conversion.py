"""Convert weights to a timm network's names and sizes with timm's own function."""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import model_entrypoint

from mae_et.checkpoints.state_dicts import Tensors
from mae_et.errors import UserError, listed
from mae_et.runtime.console import notify

QUERY_BIASES = ("qkv.bias", "q_bias", "q.bias", "q_proj.bias")
RESAMPLED = ("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")


def converted_by_timm(tensors: Tensors, network: Any) -> Tensors:
    """Apply the `checkpoint_filter_fn` of a network's timm module, if it has one.

    It renames tensors, and resamples position embeddings, relative-position biases and patch
    embeddings, which is reported on stderr. It raises errors of many types for weights of another
    network.
    """
    name = network.default_cfg["architecture"]
    convert = getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    if "adapt_layer_scale" in inspect.signature(convert).parameters:  # DeiT III's names
        convert = partial(convert, adapt_layer_scale=True)
    # timm's own deprecated indexing, and lines on stdout about each bias of DINOv3.
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
        converted: Tensors = convert(dict(_as_whole_clip(tensors)), network)
        unread = _dropped_by(convert, tensors, network)
    _refuse_dropped_biases(tensors, converted, name)
    if unread:
        notify(f"tensors that timm does not read: {len(unread)} ({listed(unread, 3)})")
    shapes = {tensor.squeeze().shape for tensor in tensors.values()}
    resized = [each for each, tensor in converted.items() if tensor.squeeze().shape not in shapes]
    resampled = [each for each in resized if each.endswith(RESAMPLED)]
    if resampled:
        notify(f"timm resampled {listed(resampled, 2)} of the weights to the size of {name}")
    return converted


def _dropped_by(convert: Callable[..., Tensors], tensors: Tensors, network: Any) -> list[str]:
    """Return the names of the tensors that a conversion drops: no gradient reaches them."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.ndim
    }
    with torch.enable_grad():
        converted = convert(_as_whole_clip(tensors | leaves), network)
        sums = (each.sum() for each in converted.values() if each.requires_grad)
        total = sum(sums, torch.zeros((), requires_grad=True))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    reached = dict(zip(leaves, gradients, strict=True))
    return [name for name in leaves if reached[name] is None and not name.endswith(RESAMPLED)]


def _as_whole_clip(tensors: Tensors) -> Tensors:
    """Name the image tower of OpenAI's CLIP, alone or in a wrapper, as in a whole CLIP."""
    mark = "class_embedding"
    for tower in (name.removesuffix(mark) for name in tensors if name.endswith(mark)):
        if f"{tower}conv1.weight" in tensors:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(tower)}
            return {f"visual.{name.removeprefix(tower)}": tensor for name, tensor in own.items()}
    return tensors


def _refuse_dropped_biases(tensors: Tensors, converted: Tensors, name: str) -> None:
    """Refuse a DINOv3 with biases (of queries and values) as timm's variant without them."""
    if any(each.endswith(QUERY_BIASES) for each in converted):
        return  # under these names, or as timm renames or splits them
    for bias in (each for each in tensors if each.endswith("attn.qkv.bias")):
        query, _, value = tensors[bias].chunk(3)
        if query.any() or value.any():
            raise UserError(f"it has {bias}, which {name} lacks: is it {name}_qkvb?")
