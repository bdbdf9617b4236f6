"""The layout of facebookresearch/mae's files, whose encoder has timm's names.

Source: facebookresearch/mae (README, FINETUNE.md; formats only).
"""

import re

from mae_et.checkpoints.state_dicts import Tensors

# MAE's names of the decoder's parts, and ours. Its positions are computed, not loaded.
MAE_DECODER = {
    "mask_token": "mask_token",
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
}
# Of the normalisation before a linear probe's head; the weights do not record it.
PROBE_EPSILON = 1e-6


def split_mae(weights: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Split a state dict into encoder, decoder and head, under our names.

    Reads pre-trained, fine-tuned (`fc_norm`, `head`) and linear-probe (`head.0`, `head.1`) files of
    MAE, and files of timm, whose names are the same as far as they go.
    """
    encoder, decoder, head = {}, {}, {}
    for name, tensor in weights.items():
        prefix = next((prefix for prefix in MAE_DECODER if name.startswith(prefix)), None)
        if prefix is not None:
            decoder[MAE_DECODER[prefix] + name.removeprefix(prefix)] = tensor
        elif name.startswith("head."):
            head[re.sub(r"^head\.(?:[01]\.)?", "", name)] = tensor
        elif name != "decoder_pos_embed":
            encoder[name] = tensor
    head.pop("num_batches_tracked", None)
    return encoder, decoder, head


def fold_probe(head: Tensors) -> Tensors:
    """Return a head as one linear layer `head.*`, a probe's normalisation multiplied into it."""
    if not head:
        return {}
    weight, bias = head["weight"].double(), head["bias"].double()
    if "running_mean" in head:
        weight = weight * (head["running_var"].double() + PROBE_EPSILON).rsqrt()
        bias = bias - weight @ head["running_mean"].double()
    dtype = head["weight"].dtype
    return {"head.weight": weight.to(dtype), "head.bias": bias.to(dtype)}
