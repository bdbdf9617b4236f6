"""Read files of weights in the field's layouts, and bring them to one set of names.

A file is recognised by what it holds, never by its name, and nothing in it is executed. The encoder
takes timm's names, the decoder ours (`mae_et/models/mae.py`), a classifier `weight` and `bias`.

Sources of the layouts: facebookresearch/mae (README, FINETUNE.md; formats only) and timm; that of
Hugging Face is in `hugging_face.py`.
"""

import argparse
import hashlib
import json
import pathlib
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from mae_et.checkpoints.checksums import Damaged, check_archive, check_safetensors
from mae_et.checkpoints.hugging_face import from_hugging_face, read_description, read_tensors
from mae_et.checkpoints.run_config import PLAIN, config_in, config_of, read_classes
from mae_et.checkpoints.store import MODEL_KEY, first_sentence, newest_checkpoint, refused_content
from mae_et.checkpoints.timm_hub import create_pretrained
from mae_et.config.schema import ModelConfig, PretrainConfig, Target
from mae_et.errors import UserError

Tensors = dict[str, Tensor]

# How MAE's layout names the decoder's parts, and we do. Its positions are computed, not loaded.
MAE_DECODER = {
    "mask_token": "mask_token",
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
}
# First digits of the released files' md5 (facebookresearch/mae, README and FINETUNE.md).
KNOWN_MD5 = {
    "8cad7c": "mae_pretrain_vit_base.pth",
    "b8b06e": "mae_pretrain_vit_large.pth",
    "9bdbb0": "mae_pretrain_vit_huge.pth",
    "1b25e9": "mae_finetuned_vit_base.pth",
    "51f550": "mae_finetuned_vit_large.pth",
    "2541f2": "mae_finetuned_vit_huge.pth",
}
# Of the normalisation before a linear probe's head, which leaves no trace of it in the weights.
PROBE_EPSILON = 1e-6
# A training checkpoint wraps its weights in one of these.
WRAPPERS = ("model", "state_dict", "module", "state_dict_ema", "model_ema")


@dataclass(frozen=True)
class Weights:
    """The content of a file, under one set of names."""

    path: Path
    layout: Literal["run", "encoder", "mae", "hf"]
    """run: a checkpoint of ours; encoder: an exported encoder of ours; mae: MAE's and timm's names;
    hf: Hugging Face's ViTMAE."""
    encoder: Tensors
    """timm's names."""
    decoder: Tensors = field(default_factory=dict)
    """Our names; empty where the file has none."""
    head: Tensors = field(default_factory=dict)
    """A classifier's weight and bias, and the running_mean and running_var of a linear probe's
    normalisation; empty where the file has none."""
    model: ModelConfig | None = None
    """The model, of files that say it."""
    config: PretrainConfig | None = None
    """The run, of checkpoints and run folders of ours; its data are only read."""
    architecture: str = PLAIN
    """timm's name of a ViT from which the encoder differs in its sizes alone."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, of files that say it."""
    decoder_num_heads: int | None = None
    """Heads of the decoder, likewise."""
    target: Target | None = None
    """What the decoder predicts, likewise."""
    grid: Sequence[int] | None = None
    """Rows and columns of the table of positions, likewise."""


def load_weights(path: Path) -> Weights:
    """Read a run folder, a folder of Hugging Face, a file, or a model of timm's hub by its name.

    Raises:
        UserError: there is none, it cannot be read without running code, or it holds no vision
            transformer.
    """
    if not path.exists():
        if timm.is_model(str(path)):
            return _from_hub(path)
        raise UserError(f"there is no checkpoint {path}")
    if path.is_dir():
        if (path / "config.json").is_file():
            return _hugging_face(path)
        if (path / "classes.json").is_file():
            return _classifier(path)
        payload = newest_checkpoint(path / "checkpoints")
        if payload is None:
            return _finished(path)
    else:
        payload = read_file(path)
    return weights_in(path, payload)


def weights_in(path: Path, payload: dict[str, Any]) -> Weights:
    """Sort what a file holds that is read already.

    Raises:
        UserError: it is no vision transformer.
    """
    try:
        return _sorted(path, payload)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # What it holds is named as ours, and is of another kind.
        raise UserError(f"{path} holds no weights of ours: {first_sentence(error)}") from None


def _sorted(path: Path, payload: dict[str, Any]) -> Weights:
    """Recognise a file's layout by what it holds, and sort its tensors."""
    if "config" in payload and "plan" in payload:
        return _run(path, payload)
    if MODEL_KEY in payload:
        model = ModelConfig(**payload[MODEL_KEY])
        return Weights(path, "encoder", payload["model"], model=model, architecture=model.encoder)
    _report_release(path)
    return mae_layout(path, payload)


def mae_layout(path: Path, payload: dict[str, Any]) -> Weights:
    """Sort tensors in MAE's or timm's layout, as they are or in a training checkpoint.

    Raises:
        UserError: they are no plain vision transformer's.
    """
    return _mae(path, _vit(path, payload))


def _finished(folder: Path) -> Weights:
    """Read the encoder that a run ended with, whose checkpoints may have been deleted since."""
    path = folder / "encoder.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint that loads")
    return replace(weights_in(path, read_file(path)), config=config_of(folder))


def _classifier(folder: Path) -> Weights:
    """Read the network that a classifier's run ended with."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} is the folder of a classifier's run that is not finished")
    return classifier_layout(folder, read_file(path))


def classifier_layout(folder: Path, tensors: Tensors) -> Weights:
    """Sort the tensors of a classifier's run, with what its folder says that they do not.

    Raises:
        UserError: they are no plain vision transformer's, or the folder's description is damaged.
    """
    about = read_classes(folder)
    return replace(
        mae_layout(folder, tensors),
        architecture=about["encoder"],
        encoder_num_heads=about["encoder_num_heads"],
        grid=about.get("grid"),
    )


def release_of(path: Path) -> str | None:
    """Return which released file of MAE a file is, by its md5; None if it is none of them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    return KNOWN_MD5.get(digest[:6])


def _report_release(path: Path) -> None:
    """Say that a file is a released one, or that it bears the name of one and is not."""
    release = release_of(path)
    if release is not None:
        print(f"mae-et: {path} is {release} as released (md5)", file=sys.stderr)
    elif path.name in KNOWN_MD5.values():
        warnings.warn(
            f"{path} is not the released file of that name: its md5 differs", stacklevel=2
        )


def _from_hub(name: Path) -> Weights:
    """Fetch a pre-trained ViT by timm's name for it (vit_base_patch16_224.mae).

    Raises:
        UserError: the hub is not reached, or the model is no plain ViT.
    """
    try:
        model = create_pretrained(str(name), num_classes=0)
    except Exception as error:  # whatever the hub's client raises
        reason = " ".join(str(error).split())
        raise UserError(f"timm cannot fetch {name} from its hub: {reason}") from None
    weights = mae_layout(name, model.state_dict())
    return replace(weights, encoder_num_heads=model.blocks[0].attn.num_heads)


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of weights without running anything in it.

    Raises:
        UserError: the file is unreadable, or holds objects other than tensors and plain types.
    """
    try:
        with path.open("rb") as file:
            is_pickle = file.read(2) in {b"PK", b"\x80\x02"}
        if not is_pickle:
            return _read_safetensors(path)
        check_archive(path)
        # Training checkpoints of MAE carry their arguments; both classes are plain holders.
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Damaged as error:
        raise UserError(str(error)) from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {refused_content(error)}") from None
    except Exception as error:  # damaged files raise what they please
        raise UserError(f"{path} cannot be read: {first_sentence(error)}") from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}, not weights")
    return payload


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors, and, where our key is in the metadata, the config of their model."""
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(MODEL_KEY)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {MODEL_KEY: json.loads(described), "model": weights} if described else weights


def unwrap(payload: dict[str, Any]) -> Tensors:
    """Find the state dict in a training checkpoint, and take DDP's prefix off."""
    for name in WRAPPERS:
        if isinstance(payload.get(name), dict):
            payload = payload[name]
            break
    return {
        name.removeprefix("module."): tensor
        for name, tensor in payload.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def differences(
    theirs: Tensors, ours: Tensors, may_lack: tuple[str, ...] = (), may_have: tuple[str, ...] = ()
) -> str:
    """Say in which tensors weights differ from a network's: how many of each kind, and up to five.

    Args:
        theirs: the weights, of any shapes.
        ours: those of the network, to which they should go.
        may_lack: beginnings of names that need not be among the weights.
        may_have: beginnings of names that need not be in the network.

    Returns:
        The missing, unexpected and misshapen, as a part of a sentence; empty where all fit.
    """
    kinds = {
        "missing": [name for name in ours if name not in theirs and not name.startswith(may_lack)],
        "unexpected": [n for n in theirs if n not in ours and not n.startswith(may_have)],
        "misshapen": [
            f"{name} is {list(theirs[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in ours.items()
            if name in theirs and theirs[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    )


def _vit(path: Path, payload: dict[str, Any]) -> Tensors:
    """Return the weights of a vision transformer, and refuse others."""
    weights = unwrap(payload)
    if "patch_embed.proj.weight" not in weights:
        raise UserError(f"{path} holds no vision transformer: there is no patch_embed.proj.weight")
    plain = weights["patch_embed.proj.weight"].ndim == 4 and "pos_embed" in weights
    if not plain or weights["pos_embed"].ndim != 3:
        raise UserError(f"{path} holds no plain vision transformer: no pos_embed or 2-D patches")
    return weights


def _run(path: Path, payload: dict[str, Any]) -> Weights:
    config = config_in(payload["config"])
    encoder, decoder = (
        {
            name.removeprefix(prefix): tensor
            for name, tensor in payload["model"].items()
            if name.startswith(prefix)
        }
        for prefix in ("encoder.", "decoder.")
    )
    return Weights(
        path, "run", encoder, decoder, model=config.model, config=config,
        architecture=config.model.encoder,
    )  # fmt: skip


def _mae(path: Path, weights: Tensors) -> Weights:
    """Split MAE's names: pre-trained, fine-tuned (fc_norm, head) and linear-probe (head.0, head.1).

    timm's names are the same, as far as they go.
    """
    encoder, decoder, head = {}, {}, {}
    for name, tensor in weights.items():
        theirs = next((prefix for prefix in MAE_DECODER if name.startswith(prefix)), None)
        if theirs is not None:
            decoder[MAE_DECODER[theirs] + name.removeprefix(theirs)] = tensor
        elif name.startswith("head."):
            head[re.sub(r"^head\.(?:[01]\.)?", "", name)] = tensor
        elif name != "decoder_pos_embed":
            encoder[name] = tensor
    head.pop("num_batches_tracked", None)
    return Weights(path, "mae", encoder, decoder, head)


def _hugging_face(folder: Path) -> Weights:
    """Read a folder of transformers' ViTMAE, with or without its decoder, or one we exported."""
    about = read_description(folder)
    encoder, decoder = from_hugging_face(folder, read_tensors(folder, read_file))
    return Weights(
        folder,
        "hf",
        encoder,
        decoder,
        encoder_num_heads=about.get("num_attention_heads"),
        decoder_num_heads=about.get("decoder_num_attention_heads"),
        target="norm_pix" if about.get("norm_pix_loss") else "pixel",
    )
