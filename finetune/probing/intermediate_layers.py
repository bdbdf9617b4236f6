"""Tokens of an encoder's intermediate blocks.

Shapes: B batch, C channels, H W image size, P prefix tokens, N patches, L layers, D width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from finetune.probing.frozen_encoder import FrozenEncoder
from finetune.probing.pooled_backbone import kind_of
from mae_et.errors import UserError


def block_indices(encoder: FrozenEncoder, layers: Sequence[int]) -> list[int]:
    """Return the indices of blocks counted from 1, or from -1, the last."""
    if not layers:
        return []
    blocks = getattr(encoder.network, "blocks", None)
    if blocks is None or not hasattr(encoder.network, "norm"):
        raise UserError(f"layers: a {kind_of(encoder.network)} has no list of blocks")
    depth = len(blocks)
    for layer in layers:
        if not 1 <= abs(layer) <= depth:
            raise UserError(f"layer {layer}: the encoder has blocks 1 to {depth}")
    return [layer - 1 if layer > 0 else depth + layer for layer in layers]


def encode_layers(encoder: FrozenEncoder, layers: Sequence[int], images: Tensor) -> Tensor:
    """Encode normalised images [B C H W] to the tokens of L blocks, each after the encoder's norm.

    Like DINOv2's `get_intermediate_layers` and timm's `forward_intermediates(norm=True)`. Blocks
    are counted from 1, or from -1, the last, which stands for none. Returns [L B P+N D], in the
    order of `layers`.
    """
    if not layers:
        return encoder.encode(images)[None]
    indices = block_indices(encoder, layers)
    outputs: dict[int, Tensor] = {}

    def keep(index: int, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[index] = output

    network = encoder.network
    hooks = [
        network.blocks[index].register_forward_hook(partial(keep, index)) for index in set(indices)
    ]
    try:
        encoder.encode(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([network.norm(outputs[index]) for index in indices])
