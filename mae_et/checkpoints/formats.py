"""Read a checkpoint once and recognise its format: the only way from a path to weights.

    a path, or a timm model's name
      -> a file's content, read once: the newest checkpoint, the last weights, shards, timm's hub
      -> recognised by content, never by name: our own run, an encoder, MAE's layout, ViTMAE
      -> Weights: encoder (timm's names), decoder (ours), head, and the settings recorded with them
      -> load_pretrained, load_encoder, and every command that takes a checkpoint
Nothing in a file is executed.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_et.checkpoints.fixed_positions import without_positions
from mae_et.checkpoints.layouts.hugging_face import (
    from_hugging_face,
    read_tensors,
    read_with_timm_names,
)
from mae_et.checkpoints.layouts.hugging_face_config import (
    folder_of,
    grid_of,
    norm_eps_of,
    numbered_names,
    read_description,
    read_preprocessor,
)
from mae_et.checkpoints.layouts.mae import check_plain_vit, split_mae
from mae_et.checkpoints.layouts.other_names import describe_folder
from mae_et.checkpoints.layouts.timm_hub import fetch_from_hub
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.recorded import (
    with_classifier,
    with_mae_arguments,
    with_our_entries,
    with_timm_config,
)
from mae_et.checkpoints.run_config import (
    config_from_checkpoint,
    config_of_run,
    read_classifier_description,
)
from mae_et.checkpoints.source import Source, recognise
from mae_et.checkpoints.state_dicts import (
    Tensors,
    check_finite,
    find_state_dict,
    largest_state_dict,
    report_unread,
    tensor_names,
)
from mae_et.checkpoints.store import newest_of_run
from mae_et.checkpoints.weight_files import read_weight_file, summarise_error
from mae_et.checkpoints.weights import Weights
from mae_et.errors import UserError, require

# Weights that `peek_weights` read, until `load_weights` takes them.
_peeked: dict[tuple[object, ...], Weights] = {}


def load_weights(path: Path, key: str | None = None) -> Weights:
    """Read a run folder, a Hugging Face folder, a weight file, or a timm model from its hub.

    `key` chooses among several sets of weights in a file, such as `teacher`.

    Raises:
        UserError: there is no such checkpoint, it cannot be read without executing code, or it
            does not hold exactly one vision transformer.
    """
    return _peeked.pop((path, key, _version(path)), None) or _read(recognise(path, key))


def peek_weights(path: Path, key: str | None = None) -> Weights:
    """Read weights ahead: the next `load_weights` of the path returns them without reading again.

    A command needs a checkpoint's config to complete its own flags, and the weights later.
    """
    weights = load_weights(path, key)
    _peeked.clear()
    _peeked[path, key, _version(path)] = weights
    return weights


def weights_of_payload(path: Path, payload: dict[str, Any], key: str | None = None) -> Weights:
    """Recognise the content of a loaded file."""
    try:
        return _recognise(path, payload, key)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Entries with our names, but values of other types.
        raise UserError(f"{path} holds no weights of ours: {summarise_error(error)}") from error


def weights_of_classifier(folder: Path, tensors: Tensors) -> Weights:
    """Recognise the tensors of a classifier's run, and add the records of its `classes.json`."""
    return with_classifier(_from_mae(folder, tensors), read_classifier_description(folder))


def _version(path: Path) -> object:
    """Return a value that changes whenever a path is written to."""
    status = path.stat() if path.exists() else None
    return status and (status.st_ino, status.st_size, status.st_mtime_ns)


def read_state_dict(source: Source, names: Collection[str]) -> Tensors:
    """Read the state dict of a network with these parameter names, whatever the network.

    All tensors of the file are returned if none of the names is found.
    """
    path, folder = source.path, folder_of(source.path)
    require(source.kind != "name", f"there is no checkpoint {path}")
    require(
        source.kind != "run" or not (path / "plan.json").is_file(),
        f"{path} is a run of mae-et pretrain and records its network: name none",
    )
    payload = read_with_timm_names(folder) if folder.is_dir() else read_tensors(source.place)
    return find_state_dict(path, payload, names, source.key) or largest_state_dict(path, payload)


def _read(source: Source) -> Weights:
    path, key = source.place, source.key
    if source.kind == "name":
        return _from_hub(path)
    if source.kind == "file":
        return weights_of_payload(path, read_tensors(path), key)
    _refuse_key(path, key)
    if source.kind == "transformers":
        return _from_hugging_face(path)
    if source.kind == "classifier":
        return _from_classifier_run(path)
    payload = newest_of_run(path)
    return _from_finished_run(path) if payload is None else weights_of_payload(path, payload)


def _refuse_key(path: Path, key: str | None) -> None:
    """Refuse a key for files that hold only one network."""
    require(key is None, f"checkpoint_key {key}: {path} holds one network; remove the key")


def _recognise(path: Path, payload: dict[str, Any], key: str | None) -> Weights:
    if {"config", "plan"} <= payload.keys():
        _refuse_key(path, key)
        return _from_run(path, payload)
    weights = with_mae_arguments(_from_mae(path, payload, key), payload)
    return with_our_entries(with_timm_config(weights, payload), payload)


def _from_run(path: Path, payload: dict[str, Any]) -> Weights:
    """Split one of our pre-training checkpoints into encoder and decoder."""
    config = config_from_checkpoint(payload["config"], path)
    parts: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for name, tensor in payload["model"].items():
        part, _, own = name.partition(".")
        if part in parts:
            parts[part][own] = tensor.float()
    check_plain_vit(path, parts["encoder"], parts["encoder"])
    return Weights(
        path,
        parts["encoder"],
        parts["decoder"],
        model=config.model,
        config=config,
        architecture=config.model.encoder,
        preprocessing=Preprocessing.of_run(config.data, config.model.image_size),
    )


def _from_finished_run(folder: Path) -> Weights:
    """Read a run's exported encoder: its checkpoints may have been deleted."""
    path = folder / "encoder.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint that loads{describe_folder(folder)}")
    weights = weights_of_payload(path, read_weight_file(path))
    return replace(weights, config=config_of_run(folder))


def _from_classifier_run(folder: Path) -> Weights:
    """Read the last weights of a classifier's run."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} is the folder of a classifier's run that is not finished")
    return weights_of_classifier(folder, read_weight_file(path))


def _from_mae(path: Path, payload: dict[str, Any], key: str | None = None) -> Weights:
    """Find tensors in MAE's or timm's layout, and split them into encoder, decoder and head."""
    tensors = find_state_dict(path, payload, {"patch_embed.proj.weight"}, key)
    check_plain_vit(path, tensors, tensors or tensor_names(payload))
    encoder, decoder, head = split_mae(tensors)
    if not head:
        report_unread(path, [name for name in tensors if name.startswith("head.")])
    for part in (encoder, decoder, head):
        check_finite(path, part, part)
    return Weights(path, encoder, without_positions(path, decoder), head)


def _from_hugging_face(folder: Path) -> Weights:
    """Read a Hugging Face folder of a ViTMAE, ViT or DINOv2: weights, config and preprocessing."""
    about = read_description(folder)
    encoder, decoder, head = from_hugging_face(folder, read_tensors(folder))
    for part in (encoder, decoder, head):
        check_finite(folder, part, part)
    return Weights(
        folder,
        encoder,
        without_positions(folder, decoder),
        head,
        classes=numbered_names(about.get("id2label")) if head else None,
        preprocessing=read_preprocessor(folder),
        encoder_num_heads=about.get("num_attention_heads"),
        decoder_num_heads=about.get("decoder_num_attention_heads"),
        norm_eps=norm_eps_of(about),
        grid=grid_of(about),
        target="norm_pix" if about.get("norm_pix_loss") else "pixel",
    )


def _from_hub(name: Path) -> Weights:
    """Fetch a pre-trained ViT by its timm name (vit_base_patch16_224.mae)."""
    model = fetch_from_hub(str(name), num_classes=0)
    weights = _from_mae(name, model.state_dict()).with_blocks_of(str(name), {})
    return replace(
        weights,
        encoder_num_heads=model.blocks[0].attn.num_heads,
        grid=model.patch_embed.grid_size,
        preprocessing=Preprocessing.of_timm(model.pretrained_cfg),
    )
