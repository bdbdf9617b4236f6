"""Build a classifier: a ViT around a checkpoint's encoder, or any timm backbone.

Sources: MAE's fine-tuning and linear probe (arXiv 2111.06377, FINETUNE.md): mean pooling with a new
norm (`fc_norm`) and a head of nearly zero, or the class token; a BatchNorm without affine before
the head of a linear probe.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from finetune.config import NetworkConfig, Pool, Probe
from mae_et.errors import UserError
from mae_et.pretrained import PUBLISHED_ENCODER_HEADS, heads_of
from mae_et.weights import Weights, load_weights

HEAD_STD = {"none": 2e-5, "linear": 0.01, "attentive": 0.01}
PROBE_EPSILON = 1e-6


def build_classifier(config: NetworkConfig, classes: int) -> nn.Module:
    """Build the network that a config names, for a number of classes.

    Raises:
        UserError: the checkpoint or the backbone cannot be used.
    """
    if config.checkpoint is None:
        return _backbone(config, classes)
    weights = load_weights(config.checkpoint)
    network = vit_around(
        weights, classes, config.image_size, config.pool, config.probe, config.drop_path,
        config.encoder_heads,
    )  # fmt: skip
    if config.probe != "none":
        freeze_encoder(network)
    return network


def vit_around(
    weights: Weights,
    classes: int,
    image_size: int,
    pool: Pool = "mean",
    probe: Probe = "none",
    drop_path: float = 0.0,
    encoder_heads: int | None = None,
) -> VisionTransformer:
    """Build a timm ViT with a checkpoint's encoder, and its head where it has as many classes.

    Positions are resampled to the image size (bicubic, antialiased, as timm does).

    Raises:
        UserError: sizes do not fit, or tensors are missing or left over; the sentence lists them.
    """
    encoder = dict(weights.encoder)
    width, channels, patch, _ = encoder["patch_embed.proj.weight"].shape
    if image_size % patch:
        raise UserError(
            f"model.image_size {image_size} is not a multiple of the patch size {patch}"
        )
    said = weights.encoder_heads or (weights.model.encoder_heads if weights.model else None)
    network: Any = timm.create_model(
        "vit_base_patch16_224",
        img_size=image_size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in encoder if name.startswith("blocks.")}),
        num_heads=heads_of("encoder", width, encoder_heads or said, PUBLISHED_ENCODER_HEADS),
        num_classes=classes,
        global_pool="map" if probe == "attentive" else {"mean": "avg", "cls": "token"}[pool],
        drop_path_rate=drop_path,
    )
    if probe == "linear":
        norm = nn.BatchNorm1d(width, affine=False, eps=PROBE_EPSILON)
        network.head = nn.Sequential(norm, nn.Linear(width, classes))
    _initialise_head(network, HEAD_STD[probe])
    encoder["pos_embed"] = _positions(encoder["pos_embed"], image_size // patch)
    _load(network, encoder, weights.path)
    _load_head(network, weights.head, probe)
    return network


def freeze_encoder(network: nn.Module) -> None:
    """Leave only the head, and an attentive probe's pooling, to be trained."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", "attn_pool.")))


def patch_of(network: nn.Module, image_size: int) -> int:
    """Return what sizes of images must be multiples of: a ViT's patch, else the usual stride."""
    embed = getattr(network, "patch_embed", None)
    if isinstance(network, VisionTransformer) and embed is not None:
        return int(embed.patch_size[0])
    return 32 if image_size % 32 == 0 else 1


def _backbone(config: NetworkConfig, classes: int) -> nn.Module:
    assert config.backbone is not None
    common: dict[str, Any] = {
        "pretrained": config.pretrained,
        "num_classes": classes,
        "in_chans": config.channels,
        "drop_path_rate": config.drop_path,
    }
    # Tables of positions and windows are laid out for a size; these follow the input's.
    follows: dict[str, Any] = {"img_size": config.image_size, "dynamic_img_size": True}
    try:
        try:
            return timm.create_model(config.backbone, **common, **follows)
        except TypeError:  # a convolutional network takes any size as it is
            return timm.create_model(config.backbone, **common)
    except Exception as error:  # unknown names, hubs that are not reached
        reason = " ".join(str(error).split())
        raise UserError(f"timm cannot build model.backbone {config.backbone!r}: {reason}") from None


def _initialise_head(network: Any, std: float) -> None:
    linear: Any = network.head[-1] if isinstance(network.head, nn.Sequential) else network.head
    trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)


def _positions(table: Tensor, grid: int) -> Tensor:
    if table.shape[1] == grid * grid + 1:
        return table
    return resample_abs_pos_embed(table, [grid, grid], num_prefix_tokens=1)


def _load(network: nn.Module, encoder: dict[str, Tensor], path: Path) -> None:
    """Load an encoder; only the norms of another pooling and the head may be left over or new."""
    try:
        missing, unexpected = network.load_state_dict(encoder, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None
    new = [n for n in missing if not n.startswith(("head.", "fc_norm.", "attn_pool.", "norm."))]
    left = [name for name in unexpected if not name.startswith(("norm.", "fc_norm."))]
    for words, names in (("lacks", new), ("has unknown", left)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{path} {words} tensors: {', '.join(names[:5])}{more}")


def _load_head(network: Any, head: dict[str, Tensor], probe: Probe) -> None:
    """Take over a classifier's head of as many classes."""
    if not head or head["weight"].shape[0] != network.num_classes:
        return
    ours: Any = network.head[-1] if isinstance(network.head, nn.Sequential) else network.head
    with torch.no_grad():
        ours.weight.copy_(head["weight"])
        ours.bias.copy_(head["bias"])
        if "running_mean" in head and probe == "linear":
            network.head[0].running_mean.copy_(head["running_mean"])
            network.head[0].running_var.copy_(head["running_var"])
