"""Read any checkpoint once, and say what it is: the only way from a path to weights.

    a path, or a timm model's name
      -> a file's content, read once: the newest checkpoint, the last weights, shards, timm's hub
      -> recognised by content, never by name: a run of ours, an encoder, MAE's layout, ViTMAE
      -> Weights: encoder (timm's names), decoder (ours), head, and what was recorded with them
      -> load_pretrained, knn, linear-probe, finetune, evaluate, dynamics, reconstruct, export

Nothing in a file is executed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm

from mae_et.checkpoints.hugging_face import from_hugging_face, read_description, read_tensors
from mae_et.checkpoints.mae_layout import split_mae
from mae_et.checkpoints.releases import report_release
from mae_et.checkpoints.run_config import (
    DEFAULT_ENCODER,
    config_from_checkpoint,
    config_of_run,
    read_classifier_description,
)
from mae_et.checkpoints.state_dicts import Tensors, unwrap
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.checkpoints.timm_hub import create_pretrained
from mae_et.checkpoints.weight_files import MODEL_KEY, read_weight_file, summarise_error
from mae_et.config.schema import ModelConfig, PretrainConfig, Target
from mae_et.errors import UserError


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights under one set of names, with the facts that came with them."""

    path: Path
    encoder: Tensors
    """timm's names."""
    decoder: Tensors = field(default_factory=dict)
    """Our names; empty without a decoder."""
    head: Tensors = field(default_factory=dict)
    """A classifier's weight and bias, and the running_mean and running_var of a linear probe's
    normalisation; empty without a head."""
    model: ModelConfig | None = None
    """The model's config, where it is recorded."""
    config: PretrainConfig | None = None
    """The run's config, of checkpoints and run folders of ours; its data are read-only."""
    architecture: str = DEFAULT_ENCODER
    """timm's name of a ViT that differs from the encoder in sizes alone."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, where they are recorded."""
    decoder_num_heads: int | None = None
    """Heads of the decoder, where they are recorded."""
    target: Target | None = None
    """The decoder's target, where it is recorded."""
    grid: Sequence[int] | None = None
    """Rows and columns of the position table, where they are recorded."""


# What `peek_weights` read, until `load_weights` is called for the same file.
_peeked: dict[tuple[Path, object], Weights] = {}


def load_weights(path: Path) -> Weights:
    """Read a run folder, a Hugging Face folder, a weight file, or a timm model from its hub.

    Raises:
        UserError: there is no such checkpoint, it cannot be read without executing code, or it
            holds no vision transformer.
    """
    weights = _peeked.pop((path, _version(path)), None)
    return _read(path) if weights is None else weights


def peek_weights(path: Path) -> Weights:
    """Read weights ahead: the next `load_weights` of the path returns them without reading again.

    A command needs a checkpoint's config before its own flags are complete, and weights after.
    """
    weights = load_weights(path)
    _peeked.clear()
    _peeked[path, _version(path)] = weights
    return weights


def weights_of_payload(path: Path, payload: dict[str, Any]) -> Weights:
    """Recognise the content of a file that has been read.

    Raises:
        UserError: it holds no vision transformer.
    """
    try:
        return _recognise(path, payload)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Its entries have our names, and values of other types.
        raise UserError(f"{path} holds no weights of ours: {summarise_error(error)}") from None


def weights_of_classifier(folder: Path, tensors: Tensors) -> Weights:
    """Recognise the tensors of a classifier's run, with what `classes.json` of its folder adds.

    Raises:
        UserError: they are no plain vision transformer's, or the description is damaged.
    """
    about = read_classifier_description(folder)
    return replace(
        _from_mae(folder, tensors),
        architecture=about["encoder"],
        encoder_num_heads=about["encoder_num_heads"],
        grid=about.get("grid"),
    )


def read_state_dict(path: Path) -> Tensors:
    """Read the tensors of any network: of a file, or the last ones of a classifier's run folder.

    Raises:
        UserError: there are none, or the file cannot be read without executing code.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    return unwrap(read_weight_file(path))


def _version(path: Path) -> object:
    """Return what changes whenever a path is written to."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> Weights:
    if not path.exists():
        if timm.is_model(str(path)):
            return _from_hub(path)
        raise UserError(f"there is no checkpoint {path}")
    if path.is_file():
        return weights_of_payload(path, read_weight_file(path))
    if (path / "config.json").is_file():
        return _from_hugging_face(path)
    if (path / "classes.json").is_file():
        return _from_classifier_run(path)
    payload = newest_checkpoint(path / "checkpoints")
    return _from_finished_run(path) if payload is None else weights_of_payload(path, payload)


def _recognise(path: Path, payload: dict[str, Any]) -> Weights:
    if "config" in payload and "plan" in payload:
        return _from_run(path, payload)
    if MODEL_KEY in payload:
        model = ModelConfig(**payload[MODEL_KEY])
        return Weights(path, payload["model"], model=model, architecture=model.encoder)
    report_release(path)
    return _from_mae(path, payload)


def _from_run(path: Path, payload: dict[str, Any]) -> Weights:
    """Sort a pre-training checkpoint of ours."""
    config = config_from_checkpoint(payload["config"])
    encoder, decoder = (
        {
            name.removeprefix(prefix): tensor
            for name, tensor in payload["model"].items()
            if name.startswith(prefix)
        }
        for prefix in ("encoder.", "decoder.")
    )
    model = config.model
    return Weights(path, encoder, decoder, model=model, config=config, architecture=model.encoder)


def _from_finished_run(folder: Path) -> Weights:
    """Read a run's exported encoder: its checkpoints may have been deleted."""
    path = folder / "encoder.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint that loads")
    weights = weights_of_payload(path, read_weight_file(path))
    return replace(weights, config=config_of_run(folder))


def _from_classifier_run(folder: Path) -> Weights:
    """Read the last weights of a classifier's run."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} is the folder of a classifier's run that is not finished")
    return weights_of_classifier(folder, read_weight_file(path))


def _from_mae(path: Path, payload: dict[str, Any]) -> Weights:
    """Sort tensors of MAE's or timm's layout, bare or in a training checkpoint."""
    tensors = unwrap(payload)
    if "patch_embed.proj.weight" not in tensors:
        raise UserError(f"{path} holds no vision transformer: there is no patch_embed.proj.weight")
    plain = tensors["patch_embed.proj.weight"].ndim == 4 and "pos_embed" in tensors
    if not plain or tensors["pos_embed"].ndim != 3:
        raise UserError(f"{path} holds no plain vision transformer: no pos_embed or 2-D patches")
    return Weights(path, *split_mae(tensors))


def _from_hugging_face(folder: Path) -> Weights:
    """Read a folder of transformers' ViTMAE, with or without its decoder."""
    about = read_description(folder)
    encoder, decoder = from_hugging_face(folder, read_tensors(folder, read_weight_file))
    return Weights(
        folder,
        encoder,
        decoder,
        encoder_num_heads=about.get("num_attention_heads"),
        decoder_num_heads=about.get("decoder_num_attention_heads"),
        target="norm_pix" if about.get("norm_pix_loss") else "pixel",
    )


def _from_hub(name: Path) -> Weights:
    """Fetch a pre-trained ViT by timm's name for it (vit_base_patch16_224.mae).

    Raises:
        UserError: the hub cannot be reached, or the model is no plain ViT.
    """
    try:
        model = create_pretrained(str(name), num_classes=0)
    except Exception as error:  # whatever the hub's client raises
        reason = " ".join(str(error).split())
        raise UserError(f"timm cannot fetch {name} from its hub: {reason}") from None
    weights = _from_mae(name, model.state_dict())
    return replace(weights, encoder_num_heads=model.blocks[0].attn.num_heads)
