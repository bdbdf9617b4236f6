"""Read the config and classes that a run recorded (untrusted, read-only, of any version)."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from mae_et.config.data import DataConfig
from mae_et.config.files import OTHER_SECTIONS, config_from_text
from mae_et.config.model_names import is_model
from mae_et.config.plain_yaml import parse_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.io.plain_files import read_text
from mae_et.io.seals import read_sealed
from mae_et.runtime.console import notify

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
REFUSAL = "is damaged, or of another version of mae-et"
# Architecture of encoders whose files record none; sizes are read from the tensors.
DEFAULT_ENCODER = "vit_base_patch16_224"


def recorded_config(text: str, kind: type[Config], path: Path, refusal: str = REFUSAL) -> Config:
    """Return the config that a run recorded.

    Versions differ mostly in `OTHER_SECTIONS`, which decide no numbers: if this version refuses
    keys of these, the defaults stand for them, and a line says so.

    The path of the file or run folder, and `refusal`, begin the error.

    Raises:
        UserError: a key that decides numbers is unknown or invalid.
    """
    try:
        return config_from_text(text, kind)
    except UserError as error:
        reason = error
    try:
        config = config_from_text(_without_others(text), kind)
    except UserError as error:
        raise UserError(f"{path} {refusal}: {error}") from None
    notify(f"{path}: sections {', '.join(OTHER_SECTIONS)} are not read, as {reason}")
    return config


def _without_others(text: str) -> str:
    """Return a config's text, and its comment on the version, without `OTHER_SECTIONS`."""
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if not isinstance(value, dict):
        return text
    kept = {key: item for key, item in value.items() if key not in OTHER_SECTIONS}
    head = text[: text.find("\n") + 1] if text.startswith("#") else ""
    return head + yaml.safe_dump(kept, sort_keys=False)


def config_from_checkpoint(text: str, path: Path) -> PretrainConfig:
    """Return the config in a checkpoint or run folder, with read-only data."""
    config = recorded_config(text, PretrainConfig, path)
    return replace(config, data=read_only_data(config.data))


def config_of_run(folder: Path) -> PretrainConfig | None:
    """Return the config of a pre-training run folder; None for any other path."""
    path = folder / "config.yaml"
    if (folder / "classes.json").is_file() or not path.is_file():
        return None  # a classifier's run has a config of another type
    return config_from_checkpoint(read_text(path), path)


def read_only_data(data: DataConfig) -> DataConfig:
    """Return a checkpoint's data config without its folders for listings and downloads.

    A checkpoint may come from a stranger: only the user decides where files are written. A download
    to our own default folder (`data/NAME`) stays allowed.
    """
    root = data.root
    if root is not None and data.source.startswith("hfds/") and not root.is_dir():
        root = None  # Hugging Face would create its cache there
    return replace(data, root=root, listing=None, download=data.download and data.root is None)


def read_classifier_description(folder: Path) -> dict[str, Any]:
    """Return the classes, encoder, heads and grid that a classifier's run folder records."""
    path = folder / "classes.json"
    return check_classifier_description(read_sealed(path), path)


def check_classifier_description(about: Any, path: Path) -> dict[str, Any]:
    """Check the types of a classifier's description."""
    about = about if isinstance(about, dict) else {}
    classes, heads, grid = about.get("classes"), about.get("encoder_num_heads"), about.get("grid")
    norm_eps = about.get("norm_eps")
    encoder = about.get("encoder") or DEFAULT_ENCODER
    backbone = about.get("backbone") or {"architecture": encoder, "arguments": {}}
    if not (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and (heads is None or type(heads) is int)
        and (grid is None or (isinstance(grid, list) and [type(n) for n in grid] == [int, int]))
        and (norm_eps is None or (type(norm_eps) is float and norm_eps > 0))
        and isinstance(encoder, str)
        and isinstance(backbone, dict)
        and [type(backbone.get(key)) for key in ("architecture", "arguments")] == [str, dict]
        and is_model(encoder)  # other names would be looked up on a hub
    ):
        raise UserError(
            f"{path} is damaged: its classes, encoder, backbone, heads, grid or norm_eps have the "
            "wrong type"
        )
    return about | {"encoder": encoder, "encoder_num_heads": heads}
