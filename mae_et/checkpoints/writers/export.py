"""Write a checkpoint in the layouts of other libraries, which open it without conversion.

timm: a folder for `timm.create_model`, or its safetensors alone. mae: a `.pth` in the layout of
facebookresearch/mae. hf: a folder for transformers' ViTMAEForPreTraining, ViTModel or
ViTForImageClassification.

A masked autoencoder is rebuilt first, which checks it. A classifier's tensors are written
unchanged: its positions may be trained, or of another size.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from mae_et.checkpoints.encoders import build_vit_of, create_vit_of
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.layouts.dinov2_head import has_dinov2_head
from mae_et.checkpoints.layouts.mae import MAE_DECODER, fold_probe, head_entries
from mae_et.checkpoints.load import masked_autoencoder
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.state_dicts import Tensors, describe_mismatch
from mae_et.checkpoints.weights import DEFAULT_EPS, Weights
from mae_et.checkpoints.writers.hugging_face import decoder_with_positions, write_hugging_face
from mae_et.checkpoints.writers.tensor_files import write_safetensors, write_torch
from mae_et.checkpoints.writers.timm_folder import write_timm_folder
from mae_et.config.commands import Format
from mae_et.config.data import DataConfig
from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable
from mae_et.models.mae import MaskedAutoencoder
from mae_et.runtime.console import say

TORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
ENDINGS_OF_OTHERS = {
    "timm": TORCH_ENDINGS, "mae": (".safetensors",), "hf": (*TORCH_ENDINGS, ".safetensors"),
}  # fmt: skip
WEIGHTS_OF_RUNS = ("encoder.safetensors", "model.safetensors", "best.safetensors")
# Parts of a block that MAE's code builds.
MAE_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def export(
    checkpoint: str | Path,
    format: Format,  # noqa: A002  (the name on the command line)
    path: str | Path,
    encoder_num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    checkpoint_key: str | None = None,
) -> Path:
    """Write a checkpoint for another library.

    A classifier is written with its head. timm opens it as a `VisionTransformer` with its
    `num_classes`, its training image size, and the `global_pool` that its norm implies: `avg`
    (`fc_norm`), `token` (`norm`) or `map` (`attn_pool`). A linear probe's normalisation is folded
    into the head for timm and Hugging Face; `mae` keeps it.

    Files for timm and `mae` also record the model or its heads, its target, the classes and the
    preprocessing of the images, which our own commands read and other libraries skip.

    Args:
        checkpoint: run folder, checkpoint, or file of released weights, of a masked autoencoder or
            a ViT classifier (for its run folder, the last weights are written).
        format: `timm`, `hf` or `mae`.
        path: file to write (`mae`, and `timm` if it ends in .safetensors), or folder.
        encoder_num_heads: attention heads of the encoder, required if the checkpoint does not
            record them and its width is not a published one.
        decoder_num_heads: attention heads of the decoder, likewise.
        checkpoint_key: choice among several sets of weights in a file, such as `teacher`.

    Returns:
        The path.

    Raises:
        UserError: the checkpoint cannot be read, the format cannot hold its decoder or head, or the
            path cannot be written.
    """
    if format not in get_args(Format):
        raise UserError(f"format must be timm, hf or mae, got {format!r}")
    path = Path(path)
    _check_place(format, path)
    weights = load_weights(Path(checkpoint), checkpoint_key)
    weights = weights.with_given(encoder_num_heads, decoder_num_heads)
    model = None
    if weights.head:
        _check_classifier(weights)
        if format != "hf" and weights.norm_eps not in {None, DEFAULT_EPS}:
            say(f"{path}: layer norms have epsilon {weights.norm_eps}, unlike timm's {DEFAULT_EPS}")
    else:
        model = masked_autoencoder(weights, decoder=format != "timm")
    encoder = weights.encoder if model is None else dict(model.encoder.state_dict())
    head = fold_probe(weights.head)
    with refuse_unwritable(str(path)):
        if format == "hf":
            write_hugging_face(path, weights, model)
        elif format == "timm" and path.suffix == ".safetensors":
            write_safetensors(encoder | head, path, weights.entries())
        elif format == "timm":
            plain_head = {name.removeprefix("head."): tensor for name, tensor in head.items()}
            plain = replace(weights, head=plain_head)
            network = build_vit_of(plain, head=True) if model is None else model.encoder
            size = network.patch_embed.img_size
            known = weights.preprocessing
            if known is None:
                known = Preprocessing.of_run(DataConfig(), size)
                say(f"{path}: {checkpoint} records no statistics; config.json has ImageNet's")
            images = (network.patch_embed.proj.in_channels, *size)
            tensors, entries = encoder | head, weights.entries()
            classes = None if weights.classes is None else list(weights.classes)
            write_timm_folder(path, network, tensors, images, known, classes, entries)
        else:
            _check_mae_encoder(encoder)
            rest = head_entries(weights.head) if model is None else _mae_decoder(model)
            write_torch(encoder | rest, path, weights.entries())
    return path


def _check_place(format: Format, path: Path) -> None:  # noqa: A002
    """Refuse suffixes of other file types, and paths that would overwrite a run's files."""
    if path.suffix in ENDINGS_OF_OTHERS[format]:
        kind = {"timm": "a folder or .safetensors", "mae": "a .pth file", "hf": "a folder"}[format]
        raise UserError(f"output {path}: format {format} writes {kind}")
    is_folder = format == "hf" or (format == "timm" and path.suffix != ".safetensors")
    place = path if is_folder else path.parent
    if (place / "plan.json").is_file() and (is_folder or path.name in WEIGHTS_OF_RUNS):
        raise UserError(f"output {path} would overwrite a file of the run: give another output")


def _check_mae_encoder(encoder: Tensors) -> None:
    """Refuse encoders that MAE's code cannot build: attentive pooling, other blocks or MLPs."""
    if "attn_pool.latent" in encoder:
        raise UserError("format mae holds no attentive pooling, as this classifier has; use timm")
    hidden, width = encoder["blocks.0.mlp.fc1.weight"].shape
    if hidden != 4 * width or "blocks.0.attn.qkv.bias" not in encoder:
        raise UserError("format mae holds an MLP of 4 widths and a bias of qkv; use timm")
    for name in encoder:
        block = re.fullmatch(r"blocks\.\d+\.(.*)\.(?:weight|bias|gamma)", name)
        if block and block[1] not in MAE_BLOCK:
            raise UserError(f"format mae has no place for {name}; use timm")


def _check_classifier(weights: Weights) -> None:
    """Refuse classifiers whose tensors timm's ViT of these sizes could not load."""
    if has_dinov2_head(weights):
        raise UserError(
            f"{weights.path} classifies by the class token and the mean of the patches, which "
            "export does not support"
        )
    registers = {"reg_token", "register_tokens"} & weights.encoder.keys()
    if registers or "cls_token" not in weights.encoder:
        raise UserError(
            f"{weights.path} is a classifier with registers, or without a class token, which "
            "export does not support"
        )
    # Tensor shapes depend on the number of patches, not on the grid's sides or on the heads.
    patches = weights.encoder["pos_embed"].shape[1] - 1
    with torch.device("meta"):
        network, tensors = create_vit_of(
            replace(weights, grid=(patches, 1), encoder_num_heads=1), head=True
        )
    mismatch = describe_mismatch(tensors, network.state_dict())
    if mismatch:
        raise UserError(f"{weights.path} does not fit timm's VisionTransformer: {mismatch}")


def _mae_decoder(model: MaskedAutoencoder) -> Tensors:
    if model.decoder is not None and model.decoder.attention != "self":
        raise UserError(
            f"format mae holds MAE's decoder, and this one is {model.decoder.attention}; use timm"
        )
    ours_to_theirs = {ours: theirs for theirs, ours in MAE_DECODER.items()}
    weights = {}
    for name, tensor in decoder_with_positions(model).items():
        ours = next((prefix for prefix in ours_to_theirs if name.startswith(prefix)), "")
        weights[ours_to_theirs.get(ours, "decoder_") + name.removeprefix(ours)] = tensor
    return weights
