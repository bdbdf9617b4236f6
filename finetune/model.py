"""Build a classifier: a ViT around a checkpoint's encoder, or any timm backbone.

Sources: MAE's fine-tuning and linear probe (arXiv 2111.06377, FINETUNE.md): mean pooling with a new
norm (`fc_norm`) and a head of nearly zero, or the class token; a BatchNorm without affine before
the head of a linear probe.
"""

import copy
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, trunc_normal_
from timm.models import model_entrypoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from finetune.config import NetworkConfig, Pool, Probe
from finetune.image_size import Size, format_size, height_and_width
from mae_et.checkpoints.formats import (
    PROBE_EPSILON,
    Weights,
    classifier_layout,
    differences,
    load_weights,
    read_file,
    unwrap,
)
from mae_et.checkpoints.load import PUBLISHED_ENCODER_HEADS, depth_of, heads_of
from mae_et.checkpoints.run_config import read_classes
from mae_et.checkpoints.timm_hub import create_pretrained
from mae_et.errors import UserError
from mae_et.models.mae import create_vit

HEAD_STD = {"none": 2e-5, "linear": 0.01, "attentive": 0.01}


def build_classifier(config: NetworkConfig, classes: int) -> nn.Module:
    """Build the network that a config names, for a number of classes.

    Raises:
        UserError: the checkpoint or the backbone cannot be used.
    """
    if config.backbone is not None:
        network = _backbone(config, classes)
        if config.checkpoint is not None:
            _load_backbone(network, config.checkpoint, config.backbone)
        return network
    assert config.checkpoint is not None  # one of the two is given
    return build_vit_classifier(config, load_weights(config.checkpoint), classes)


def load_run_network(config: NetworkConfig, folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """Build the network of a run around its own weights, for what it started from may be gone.

    Args:
        config: of the run.
        folder: of the run, which says the classes and what else weights do not.
        tensors: the weights, under timm's names.

    Raises:
        UserError: they do not fit each other, or what the folder says is damaged.
    """
    classes = len(read_classes(folder)["classes"])
    if config.backbone is not None:
        network = build_classifier(replace(config, pretrained=False, checkpoint=None), classes)
    else:
        network = build_vit_classifier(config, classifier_layout(folder, tensors), classes)
    differing = differences(tensors, network.state_dict())
    if differing:
        raise UserError(f"the weights of {folder} do not fit: {differing}")
    network.load_state_dict(tensors)
    return network


def build_vit_classifier(config: NetworkConfig, weights: Weights, classes: int) -> nn.Module:
    """Build what a config asks for around the encoder of weights that are at hand.

    Raises:
        UserError: see `build_vit`.
    """
    network = build_vit(
        weights,
        classes,
        config.image_size,
        config.pool,
        config.probe,
        config.drop_path,
        config.encoder_num_heads,
        config.patch_size,
    )
    if config.probe != "none":
        freeze_encoder(network)
    return network


def build_vit(
    weights: Weights,
    classes: int,
    image_size: Size,
    pool: Pool = "mean",
    probe: Probe = "none",
    drop_path: float = 0.0,
    encoder_num_heads: int | None = None,
    patch_size: int | None = None,
) -> VisionTransformer:
    """Build a timm ViT with a checkpoint's encoder, and its head where it has as many classes.

    Positions are resampled to the image size (bicubic, antialiased), and the patch embedding to
    another patch size, both by timm's functions.

    Args:
        weights: what the checkpoint holds.
        classes: number of classes.
        image_size: side of the images in pixels, or (height, width).
        pool: mean of the patch tokens, or class token.
        probe: what is trained, which decides the head.
        drop_path: chance of dropping a residual branch in the last block.
        encoder_num_heads: heads of the encoder; required where the weights do not record them and
            their width is not a published one.
        patch_size: side of a patch in pixels; the checkpoint's own by default.

    Raises:
        UserError: sizes do not fit, or tensors are missing or left over; the sentence lists them.
    """
    encoder = dict(weights.encoder)
    width, channels, own_patch, _ = encoder["patch_embed.proj.weight"].shape
    patch = patch_size or own_patch
    height, width_in_pixels = sides = height_and_width(image_size)
    if height % patch or width_in_pixels % patch:
        raise UserError(
            f"model.image_size {format_size(image_size)} is not a multiple of the patch size "
            f"{patch}"
        )
    if patch != own_patch:
        kernel = encoder["patch_embed.proj.weight"]
        encoder["patch_embed.proj.weight"] = resample_patch_embed(kernel, [patch, patch])
    if weights.model is not None:
        heads = weights.model.encoder_num_heads  # None: as many as the architecture has
    else:
        given = weights.encoder_num_heads or encoder_num_heads
        heads = heads_of("encoder", width, given, PUBLISHED_ENCODER_HEADS)
    network = create_vit(
        weights.architecture,
        img_size=sides,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=depth_of(encoder),
        num_classes=classes,
        global_pool="map" if probe == "attentive" else {"mean": "avg", "cls": "token"}[pool],
        drop_path_rate=drop_path,
        dynamic_img_size=True,  # for a curriculum's smaller stages
        **({} if heads is None else {"num_heads": heads}),
    )
    if probe == "linear":
        norm = nn.BatchNorm1d(width, affine=False, eps=PROBE_EPSILON)
        network.head = nn.Sequential(norm, nn.Linear(width, classes))
    _initialise_head(network, HEAD_STD[probe])
    grid = [side // patch for side in sides]
    encoder["pos_embed"] = _positions(weights, grid)
    _load(network, encoder, weights.path)
    _load_head(network, weights.head, probe)
    return network


def freeze_encoder(network: nn.Module) -> None:
    """Leave only the head, and an attentive probe's pooling, to be trained."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", "attn_pool.")))


def size_multiple(network: nn.Module, image_size: Size) -> int:
    """Return what sizes of images must be multiples of: a ViT's patch, else the usual stride."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch is not None and patch[0] > 4:  # hierarchical networks begin with 4 and go on to 32
        return int(patch[0])
    return 32 if all(side % 32 == 0 for side in height_and_width(image_size)) else 1


def check_sizes(network: nn.Module, sizes: set[tuple[int, int]], channels: int) -> None:
    """Refuse sizes of images that a network does not take, before it is trained.

    Raises:
        UserError: a forward pass at one of them fails.
    """
    dry = copy.deepcopy(network).to("meta").eval()
    for size in sorted(sizes):
        try:
            with torch.no_grad():
                dry(torch.empty(1, channels, *size, device="meta"))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the network does not take images of {format_size(size)} pixels, which the "
                f"curriculum shows it: {reason}"
            ) from None


def _backbone(config: NetworkConfig, classes: int) -> nn.Module:
    assert config.backbone is not None
    create = create_pretrained if config.pretrained else timm.create_model
    common: dict[str, Any] = {
        "num_classes": classes,
        "in_chans": config.channels,
        # Networks without residual branches refuse to hear of it.
        **({"drop_path_rate": config.drop_path} if config.drop_path else {}),
    }
    # Tables of positions and windows are laid out for a size; these follow the input's.
    follows: dict[str, Any] = {"img_size": config.image_size, "dynamic_img_size": True}
    try:
        try:
            return create(config.backbone, **common, **follows)
        except TypeError:  # a convolutional network takes any size as it is
            return create(config.backbone, **common)
    except Exception as error:  # unknown names, hubs that are not reached
        reason = " ".join(str(error).split())
        raise UserError(f"timm cannot build model.backbone {config.backbone!r}: {reason}") from None


def _load_backbone(network: Any, checkpoint: Path, name: str) -> None:
    """Load a checkpoint of the same timm model; a head of other classes stays new.

    What was trained at another size of images or patches is adapted as timm adapts its own weights.
    """
    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    head = network.default_cfg.get("classifier", "head")
    heads = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
    theirs, ours = unwrap(read_file(path)), network.state_dict()
    kept = _without_other_heads(theirs, ours, heads)
    if differences(kept, ours, may_lack=heads):
        kept = _without_other_heads(_adapted(network, theirs), ours, heads)
    differing = differences(kept, ours, may_lack=heads)
    if differing:
        raise UserError(f"{name} and {path} differ: {differing}")
    network.load_state_dict(kept, strict=False)


def _without_other_heads(
    theirs: dict[str, Tensor], ours: dict[str, Tensor], heads: tuple[str, ...]
) -> dict[str, Tensor]:
    """Leave out the tensors of a head that tells other classes."""
    return {
        key: tensor
        for key, tensor in theirs.items()
        if not (key.startswith(heads) and key in ours and ours[key].shape != tensor.shape)
    }


def _adapted(network: Any, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pass weights through the function by which timm fits its own to a network of this kind.

    It resamples tables of positions, biases of windows and patch embeddings. Weights come back as
    they are where the network's module has none, or where it cannot make sense of them.
    """
    entry = model_entrypoint(network.default_cfg["architecture"])
    adapt = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return theirs
    try:
        with warnings.catch_warnings(action="ignore"):  # of how timm indexes, which nobody can help
            return adapt(dict(theirs), network)
    except Exception:  # unknown names, shapes of another network: what differs is then told
        return theirs


def _initialise_head(network: Any, std: float) -> None:
    linear: Any = network.head[-1] if isinstance(network.head, nn.Sequential) else network.head
    trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)


def _positions(weights: Weights, grid: list[int]) -> Tensor:
    """Resample a table of positions to a grid.

    It is taken for square where its file does not say of which grid it is, and, where that cannot
    be, for one of this grid.

    Raises:
        UserError: it can be neither.
    """
    table = weights.encoder["pos_embed"]
    count = table.shape[1] - 1
    side = math.isqrt(max(count, 0))
    own = [side, side]
    if weights.grid is not None:
        own = list(weights.grid)
    elif side * side != count:
        own = grid
    if math.prod(own) != count:
        raise UserError(
            f"{weights.path} has {count} positions, which are those of no square, nor of "
            f"{grid[0]} x {grid[1]} patches (model.image_size)"
        )
    if own == grid:
        return table
    return resample_abs_pos_embed(table, grid, own, num_prefix_tokens=1)


def _load(network: nn.Module, encoder: dict[str, Tensor], path: Path) -> None:
    """Load an encoder; only the norms of another pooling and the head may be left over or new."""
    # A new norm belongs to mean pooling alone; elsewhere the encoder's own must be there.
    new, left = ("head.", "fc_norm.", "attn_pool."), ("norm.", "fc_norm.")
    differing = differences(encoder, network.state_dict(), may_lack=new, may_have=left)
    if differing:
        raise UserError(f"{path} does not fit: {differing}")
    network.load_state_dict(encoder, strict=False)


def _load_head(network: Any, head: dict[str, Tensor], probe: Probe) -> None:
    """Take over a classifier's head of as many classes."""
    normalised = "running_mean" in head
    if not {"weight", "bias"} <= set(head) or normalised != (probe == "linear"):
        return
    if head["weight"].shape[0] != network.num_classes:
        return
    ours: Any = network.head[-1] if isinstance(network.head, nn.Sequential) else network.head
    with torch.no_grad():
        ours.weight.copy_(head["weight"])
        ours.bias.copy_(head["bias"])
        if normalised:
            network.head[0].running_mean.copy_(head["running_mean"])
            network.head[0].running_var.copy_(head["running_var"])
