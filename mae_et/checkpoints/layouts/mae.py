"""The layout of facebookresearch/mae's files, whose encoder uses timm's names.

Source: facebookresearch/mae (README, FINETUNE.md; formats only).
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from mae_et.checkpoints.layouts.other_names import BY_NAME, recognise_network
from mae_et.checkpoints.state_dicts import Tensors
from mae_et.errors import UserError

# MAE's names of the decoder's parts, and ours.
MAE_DECODER = {
    "decoder_pos_embed": "pos_embed",
    "mask_token": "mask_token",
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
}
# Mask tokens that other methods store in the encoder (DINOv2, iBOT, lightly).
MASK_TOKENS = ("mask_token", "masked_embed")
# Epsilon of the normalisation before a linear probe's head; the weights do not record it.
PROBE_EPSILON = 1e-6


def split_mae(weights: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Split a state dict into encoder, decoder and head, under our names.

    Supports MAE's pre-trained, fine-tuned (`fc_norm`, `head`) and linear-probe (`head.0`, `head.1`)
    files, and timm's, which use the same names. Dropped are a mask token without a decoder, timm's
    untrained head beside one (lightly), and other heads than those: projections of contrastive
    learning, classifiers of several layers.
    """
    encoder, decoder, head = {}, {}, {}
    if not any(name.startswith("decoder_") for name in weights):
        weights = {name: tensor for name, tensor in weights.items() if name not in MASK_TOKENS}
    for name, tensor in weights.items():
        prefix = next((prefix for prefix in MAE_DECODER if name.startswith(prefix)), None)
        if prefix is not None:
            decoder[MAE_DECODER[prefix] + name.removeprefix(prefix)] = tensor
        elif name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        else:
            encoder[name] = tensor
    return encoder, decoder, {} if "embed.weight" in decoder else _linear(head)


def _linear(head: Tensors) -> Tensors:
    """Return a head that is one linear layer, or a linear probe's; empty for others."""
    head = {name: tensor for name, tensor in head.items() if name != "0.num_batches_tracked"}
    layers = {name.rpartition(".")[0] for name in head}
    first = {name for name in head if name.startswith("0.")}
    is_probe = layers == {"0", "1"} and first == {"0.running_mean", "0.running_var"}
    if not (is_probe or layers in ({""}, {"0"}, {"1"})):
        return {}
    return {name.rpartition(".")[2]: tensor for name, tensor in head.items()}


def head_entries(head: Tensors) -> Tensors:
    """Return a head under MAE's names: a probe's normalisation is `head.0`, its layer `head.1`."""
    if "running_mean" not in head:
        return {f"head.{name}": tensor for name, tensor in head.items()}
    places = {"running_mean": 0, "running_var": 0, "weight": 1, "bias": 1}
    # The state dict of a BatchNorm has a count of batches, which evaluation does not use.
    counted = {"head.0.num_batches_tracked": torch.tensor(0)}
    return {f"head.{places[name]}.{name}": tensor for name, tensor in head.items()} | counted


def fold_probe(head: Tensors) -> Tensors:
    """Return a head as one linear layer `head.*`, with a probe's normalisation folded in."""
    if not head:
        return {}
    weight, bias = head["weight"].double(), head["bias"].double()
    if "running_mean" in head:
        weight = weight * (head["running_var"].double() + PROBE_EPSILON).rsqrt()
        bias = bias - weight @ head["running_mean"].double()
    dtype = head["weight"].dtype
    return {"head.weight": weight.to(dtype), "head.bias": bias.to(dtype)}


def check_plain_vit(path: Path, tensors: Tensors, names: Iterable[str]) -> None:
    """Refuse an encoder without the tensors from which readers infer its sizes.

    `names` are those of all tensors, by which other networks are recognised.
    """
    lacking = [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in tensors]
    if lacking and (network := recognise_network(names)):
        what, advice = network
        raise UserError(f"{path} holds {what}, no plain vision transformer: {advice}")
    if lacking:
        advice = f": {BY_NAME}" if lacking == ["pos_embed"] else ""
        cause = f"there is no {lacking[0]}{advice}"
        raise UserError(f"{path} holds no plain vision transformer: {cause}")
    if tensors["patch_embed.proj.weight"].ndim != 4:
        raise UserError(f"{path} holds no plain vision transformer: its patches are not 2-D")
    if tensors["pos_embed"].ndim != 3:
        shape = list(tensors["pos_embed"].shape)
        raise UserError(f"{path} holds no plain vision transformer: its pos_embed is {shape}")
