"""Load the encoder of a vision transformer (ours, timm's or Hugging Face's) as a timm model.

Sizes, class token, registers, LayerScale and fc_norm are read from the state dict. Settings that it
does not show (activations, norms before the blocks, other MLPs) require the timm model's name.
"""

import math
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_et.checkpoints.formats import load_weights, read_state_dict
from mae_et.checkpoints.layouts.dinov2_head import add_dinov2_head, has_dinov2_head
from mae_et.checkpoints.layouts.hugging_face_config import activation_of, norm_eps_of
from mae_et.checkpoints.layouts.mae import PROBE_EPSILON, head_entries
from mae_et.checkpoints.layouts.timm_config import timm_arguments
from mae_et.checkpoints.layouts.timm_conversion import converted_by_timm
from mae_et.checkpoints.layouts.timm_hub import fetch_from_hub
from mae_et.checkpoints.load import masked_autoencoder, num_heads_of
from mae_et.checkpoints.run_config import DEFAULT_ENCODER
from mae_et.checkpoints.source import Source, recognise
from mae_et.checkpoints.state_dicts import Tensors, check_finite, depth_of, describe_mismatch
from mae_et.checkpoints.weights import NAME_IT, Weights
from mae_et.errors import UserError, listed, one_line
from mae_et.models.encoder import create_vit, set_norm_eps
from mae_et.runtime.console import notify


def load_encoder(
    checkpoint: str | Path,
    encoder_num_heads: int | None = None,
    architecture: str | None = None,
    checkpoint_key: str | None = None,
) -> Any:
    """Load an encoder as a timm model without a head; nothing in the file is executed.

    Args:
        checkpoint: run folder (of pre-training or of a fine-tuned ViT), checkpoint, file of weights
            in MAE's or timm's layout, Hugging Face folder (ViTMAE, ViT, DINOv2 with and without
            registers), or the name of a timm model, whose weights are fetched from its hub.
        encoder_num_heads: attention heads, required if the checkpoint does not record them and its
            width is not a published one.
        architecture: timm's name of the network, required if the weights do not determine it
            (CLIP, SwiGLU, distilled DeiT); timm's own conversion is applied.
        checkpoint_key: choice among several sets of weights in a file, such as `teacher`.

    Returns:
        The network on the CPU, in evaluation mode, at the checkpoint's image size; all parameters
        can be trained, positions included. It has `forward_features`, from normalised images
        [B C H W] to tokens [B P+N D], and `num_prefix_tokens`, P.

    Raises:
        UserError: there is no such checkpoint, or it is not a vision transformer.
    """
    source = recognise(Path(checkpoint), checkpoint_key, architecture)
    if source.is_named:
        network = named_network(source)
        if not returns_tokens(network):
            raise UserError(
                f"{checkpoint} is not a vision transformer: it returns no list of tokens"
            )
        return network
    weights = load_weights(source.path, checkpoint_key)
    return encoder_of_weights(weights.with_given(encoder_num_heads))


def named_network(source: Source) -> Any:
    """Build or fetch a network that timm builds by name, without a head."""
    if source.architecture is None:
        return fetch_from_hub(str(source.path), num_classes=0).eval()
    return build_named(source).eval()


def returns_tokens(network: Any) -> bool:
    """Return whether `forward_features` of a timm network returns tokens, as a ViT's."""
    sized = getattr(getattr(network, "patch_embed", None), "img_size", None) is not None
    return sized and hasattr(network, "num_prefix_tokens")


def encoder_of_weights(weights: Weights) -> VisionTransformer:
    """Build the encoder of loaded weights; see `load_encoder`."""
    if weights.model is not None:
        # MAE fixes the positions in pre-training only; other files' encoders train theirs too.
        return masked_autoencoder(weights, decoder=False).encoder.requires_grad_(True)
    return build_vit_of(weights)


def build_vit_of(weights: Weights, head: bool = False) -> VisionTransformer:
    """Build the ViT that the tensors of weights determine, and load them.

    The weights must record their number of heads if their width is not a published one. With `head`
    the classifier is loaded too, and a linear probe's normalisation before it.
    """
    network, tensors = create_vit_of(weights, head)
    mismatch = describe_mismatch(tensors, network.state_dict())
    if mismatch:
        raise UserError(f"{weights.path} is not a plain vision transformer ({mismatch}): {NAME_IT}")
    weights.report_assumed_blocks()
    network.load_state_dict(tensors)
    return network.eval()


def create_vit_of(
    weights: Weights, head: bool = False, **others: Any
) -> tuple[VisionTransformer, Tensors]:
    """Create a ViT with the sizes and parts of weights; return it and the tensors to load.

    `others` are timm's arguments that override those of the weights.
    """
    tensors = to_timm_layout(weights.encoder)
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    class_tokens = int("cls_token" in tensors)
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    positions, prefix = tensors["pos_embed"].shape[1], class_tokens + registers
    rows, columns = weights.grid or (_side(positions) or _side(positions - prefix),) * 2
    if rows * columns not in {positions, positions - prefix}:
        raise UserError(
            f"{weights.path} has {positions} positions, which fit no square grid: {NAME_IT}, or "
            "its --image_size"
        )
    if weights.grid is None and rows * columns == positions and prefix == 1:
        notify(
            f"{weights.path}: {positions} positions are taken for {rows} x {columns} patches, "
            f"none for the class token; if not, {NAME_IT}"
        )
    is_map = "attn_pool.latent" in tensors
    if is_map and not class_tokens and weights.architecture == DEFAULT_ENCODER:
        raise UserError(
            f"{weights.path} has SigLIP's attentive pooling, with which activations differ and "
            f"are not recorded: {NAME_IT}"
        )
    has_norm = "fc_norm.weight" in tensors
    pool = "avg" if has_norm or not class_tokens else "token"
    linear = weights.head.get("weight", weights.head.get("bias", ())) if head else ()
    settings = {
        "img_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": depth_of(tensors),
        "num_classes": len(linear),
        "class_token": bool(class_tokens),
        "reg_tokens": registers,
        "no_embed_class": rows * columns == positions,
        "global_pool": "map" if is_map else pool,
        "fc_norm": has_norm,
        "final_norm": has_norm or "norm.weight" in tensors,
        **_traces(tensors, width),
    }
    if weights.model is None:
        settings["num_heads"] = num_heads_of("encoder", width, weights.encoder_num_heads)
    elif weights.model.encoder_num_heads is not None:  # otherwise the architecture's own
        settings["num_heads"] = weights.model.encoder_num_heads
    network = create_vit(weights.architecture, **settings | others)
    set_norm_eps(network, weights.norm_eps)
    if head and "running_mean" in weights.head:
        norm = nn.BatchNorm1d(width, affine=False, eps=PROBE_EPSILON)
        network.head = nn.Sequential(norm, network.head)
    if head and has_dinov2_head(weights):
        add_dinov2_head(network)
    return network, tensors | (head_entries(weights.head) if head else {})


def to_timm_layout(encoder: Tensors) -> Tensors:
    """Convert DINOv2's layout, in which the class token has a position and registers have none."""
    tensors = dict(encoder)
    if "register_tokens" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
    positions = tensors["pos_embed"]
    if {"cls_token", "reg_token"} <= tensors.keys() and _side(positions.shape[1] - 1):
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
    return tensors


def _traces(tensors: Tensors, width: int) -> dict[str, Any]:
    """Return the block settings that tensor names and shapes determine."""
    hidden = tensors.get("blocks.0.mlp.fc1.weight")
    return {
        "qkv_bias": any(name.endswith("attn.qkv.bias") for name in tensors),
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        # timm truncates the product.
        **({} if hidden is None else {"mlp_ratio": (hidden.shape[0] + 0.5) / width}),
    }


def _side(count: int) -> int:
    """Return the side of a square grid of `count` patches; 0 if `count` is not a square."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def build_named(source: Source, head: bool = False) -> Any:
    """Build a timm model by name and load weights, whose names timm converts to its own.

    With `head` the classifier is loaded too; its bias gives the number of classes.
    """
    path, architecture, about = source.path, str(source.architecture), source.description()
    arguments = timm_arguments(path, architecture) | activation_of(about, path)
    network = create_vit(architecture, **arguments, num_classes=0)
    tensors = read_weights_of(network, source)
    parts = classifier_prefixes(network)
    if head:
        biases = [tensors[f"{part}bias"] for part in parts if f"{part}bias" in tensors]
        if not biases:
            raise UserError(f"{path} is not a classifier: it has no {parts[0]}bias")
        network = create_vit(architecture, **arguments, num_classes=len(biases[0]))
    try:
        tensors = converted_by_timm(tensors, network)
    except Exception as error:  # names and shapes of another network
        raise UserError(f"timm cannot read {path} as {architecture}: {one_line(error)}") from error
    if mismatch := describe_mismatch(tensors, network.state_dict(), may_have=() if head else parts):
        raise UserError(f"{path} does not fit {architecture}: {mismatch}")
    check_finite(path, tensors, network.state_dict())
    network.load_state_dict(tensors, strict=False)
    set_norm_eps(network, norm_eps_of(about))
    return network


def read_weights_of(network: Any, source: Source) -> Tensors:
    """Read weights for a timm model; sizes and head may differ. See `read_state_dict`."""
    tensors = read_state_dict(source, network.state_dict().keys())
    by_timm = timm_arguments(source.path, network.default_cfg["architecture"])
    recorded = source.description().get("num_attention_heads") or by_timm.get("num_heads")
    found = (getattr(part, "num_heads", None) for part in network.modules())
    others = {heads for heads in found if isinstance(heads, int) and heads != recorded}
    if isinstance(recorded, int) and others:
        own = listed(sorted(others))
        raise UserError(f"the network has {own} heads, and {source.path} records {recorded}")
    # DINOv2's registers in transformers' layout; timm itself converts the released files.
    return to_timm_layout(tensors) if {"pos_embed", "reg_token"} <= tensors.keys() else tensors


def classifier_prefixes(network: Any) -> tuple[str, ...]:
    """Return the prefixes of a timm model's classifier parameters, such as `head.`."""
    parts = network.default_cfg.get("classifier", "head")
    return tuple(f"{part}." for part in ([parts] if isinstance(parts, str) else parts))
