"""Write a Hugging Face folder: weights, config, image processor and model card.

A masked autoencoder of pixels becomes a ViTMAEForPreTraining, any other encoder a ViTModel, and a
classifier on the class token a ViTForImageClassification.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et.checkpoints.layouts.hugging_face import to_hugging_face
from mae_et.checkpoints.layouts.mae import fold_probe
from mae_et.checkpoints.load import num_heads_of
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.state_dicts import Tensors, depth_of
from mae_et.checkpoints.weights import DEFAULT_EPS, Weights
from mae_et.checkpoints.writers.model_card import model_card
from mae_et.checkpoints.writers.tensor_files import write_safetensors
from mae_et.config.data import IMAGENET_MEAN, IMAGENET_STD, resized_side
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import sincos_positions
from mae_et.runtime.console import say


def write_hugging_face(folder: Path, weights: Weights, model: MaskedAutoencoder | None) -> None:
    """Write a folder that transformers opens without conversion; a classifier has no `model`."""
    if model is None:
        tensors, about = _classifier(weights)
    elif _is_vit_mae(model):
        tensors, about = vit_mae(model)
    else:
        tensors, about = _vit(model)
    write_safetensors(tensors, folder / "model.safetensors")
    if not isinstance(about["image_size"], int):
        say(
            f"{folder}: transformers has no view of {about['image_size']} pixels that "
            "covers it: images of other aspect ratios get black borders, unlike in mae-et evaluate"
        )
    channels = about["num_channels"]
    preprocessing = weights.preprocessing or assumed_preprocessing(weights.path, channels)
    processor = image_processor(preprocessing, about["image_size"], channels)
    for name, content in (("config", about), ("preprocessor_config", processor)):
        write_text_atomically(folder / f"{name}.json", json.dumps(content, indent=2))
    write_text_atomically(folder / "README.md", model_card(weights, about))


def assumed_preprocessing(path: Path, channels: int) -> Preprocessing:
    """Return and report default statistics (ImageNet's for RGB) for a checkpoint that has none."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    say(f"{path} records no statistics of its images: mean {[*mean]}, std {[*std]} are written")
    return Preprocessing(mean, std)


def image_processor(
    preprocessing: Preprocessing, image_size: int | list[int], channels: int
) -> dict[str, Any]:
    """Return a `preprocessor_config.json` that reproduces our evaluation view.

    The shorter side is resized to image size / eval crop, bicubic and antialiased, then the centre
    is cropped. Hugging Face's default backend resizes tensors where ours resizes PIL images: values
    differ by at most two of 255 grey levels. It halves an odd margin downwards where torchvision
    rounds to even, so a view may begin one pixel earlier. BitImageProcessor is the class of
    DINOv2's models.
    """
    sides = [image_size] * 2 if isinstance(image_size, int) else image_size
    statistics = (preprocessing.mean, preprocessing.std)
    mean, std = (list(part) * (channels if len(part) == 1 else 1) for part in statistics)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized_side(min(sides), preprocessing.eval_crop)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": sides[0], "width": sides[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _is_vit_mae(model: MaskedAutoencoder) -> bool:
    """Return whether ViTMAE can represent a model: MAE's decoder, pixel targets, square images."""
    return (
        model.decoder is not None
        and model.decoder.attention == "self"
        and model.target in {"pixel", "norm_pix"}
        and model.base_grid[0] == model.base_grid[1]
    )


def vit_mae(model: MaskedAutoencoder) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the `config.json` of a ViTMAEForPreTraining."""
    decoder: Any = model.decoder
    tensors = to_hugging_face(model.encoder.state_dict(), decoder_with_positions(model))
    return tensors, {
        **_encoder_of(model),
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": decoder.embed.out_features,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": decoder.blocks[0].attn.num_heads,
        "decoder_intermediate_size": decoder.blocks[0].mlp.fc1.out_features,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.target == "norm_pix",
    }


def _vit(model: MaskedAutoencoder) -> tuple[Tensors, dict[str, Any]]:
    tensors = to_hugging_face(model.encoder.state_dict())
    named = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    return named, {**_encoder_of(model), "architectures": ["ViTModel"], "model_type": "vit"}


def _classifier(weights: Weights) -> tuple[Tensors, dict[str, Any]]:
    encoder = weights.encoder
    if "norm.weight" not in encoder or "attn_pool.latent" in encoder:
        pooling = "attentive pooling" if "attn_pool.latent" in encoder else "mean pooling"
        raise UserError(
            f"format hf classifies by the class token, and this classifier has {pooling}: use "
            "timm, or fine-tune with model.pool cls"
        )
    positions = encoder["pos_embed"].shape[1] - 1
    grid = weights.grid or [round(positions**0.5)] * 2
    if math.prod(grid) != positions:
        raise UserError(f"format hf needs the grid of {weights.path}, which it does not record")
    head = fold_probe(weights.head)
    tensors = to_hugging_face(encoder, head=head)
    classes = weights.classes or [f"LABEL_{n}" for n in range(len(head["head.bias"]))]
    width = encoder["pos_embed"].shape[-1]
    heads = num_heads_of("encoder", width, weights.encoder_num_heads)
    return tensors, {
        **_encoder_config(encoder, grid, heads, weights.norm_eps or DEFAULT_EPS),
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def _encoder_of(model: MaskedAutoencoder) -> dict[str, Any]:
    encoder: Any = model.encoder  # timm's blocks have no static type
    return _encoder_config(encoder.state_dict(), model.base_grid, encoder.blocks[0].attn.num_heads)


def _encoder_config(
    encoder: Tensors, grid: Sequence[int], heads: int, norm_eps: float = DEFAULT_EPS
) -> dict[str, Any]:
    width, channels, patch, _ = encoder["patch_embed.proj.weight"].shape
    height, across = (side * patch for side in grid)
    return {
        "image_size": height if height == across else [height, across],
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": depth_of(encoder),
        "num_attention_heads": heads,
        "intermediate_size": encoder["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "qkv_bias": "blocks.0.attn.qkv.bias" in encoder,
        "layer_norm_eps": norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }


def decoder_with_positions(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Return the decoder's weights, with the positions that other layouts store."""
    if model.decoder is None:
        return {}
    width = model.decoder.embed.out_features
    laid_over = model.position_grid or model.base_grid
    table = sincos_positions(model.base_grid, laid_over, width, torch.device("cpu"))
    positions = torch.cat([torch.zeros(1, width), table])[None]
    return dict(model.decoder.state_dict()) | {"pos_embed": positions}
