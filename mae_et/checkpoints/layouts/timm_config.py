"""Read the `config.json` that timm, or transformers of a timm model, writes beside weights."""

from pathlib import Path
from typing import Any

from mae_et.checkpoints.layouts.hugging_face_config import WEIGHT_FILES, numbered_names
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.errors import UserError, listed
from mae_et.io.plain_files import read_mapping

TRACELESS = ("act_layer", "attn_layer", "block_fn", "mlp_layer", "norm_layer")
"""Arguments of a ViT that its tensors do not show."""


def read_timm_config(path: Path) -> dict[str, Any]:
    """Return the `config.json` in a folder or beside a file, if of a timm model; else empty."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    about = read_mapping(file) if path.exists() and file.is_file() else {}
    by_timm = about.get("model_type", "timm_wrapper") == "timm_wrapper"  # transformers' wrapper
    if not (by_timm and isinstance(about.get("architecture"), str)):
        about["architecture"] = None  # transformers' own model, or damaged
    return about if about["architecture"] or "pretrained_cfg" in about else {}


def timm_preprocessing(path: Path) -> Preprocessing | None:
    """Return the preprocessing in the `config.json` of a folder or beside a file, if any."""
    about = read_timm_config(path)
    return Preprocessing.of_timm(about.get("pretrained_cfg"), f"the config.json of {path}")


def timm_architecture(path: Path) -> str | None:
    """Return the architecture of a folder or weight file that timm saved; None for others."""
    named: str | None = read_timm_config(path).get("architecture")
    return named if path.is_dir() or path.name in WEIGHT_FILES else None


def timm_arguments(path: Path, architecture: str | None) -> dict[str, Any]:
    """Return the arguments that timm records for this architecture, except its classes."""
    about = read_timm_config(path)
    arguments = about.get("model_args")
    if architecture is None or about.get("architecture") != architecture.partition(".")[0]:
        return {}
    if not isinstance(arguments, dict):
        return {}
    return {key: value for key, value in arguments.items() if key != "num_classes"}


def refuse_traceless(path: Path, arguments: dict[str, Any]) -> None:
    """Refuse timm's arguments for a network that is built without them."""
    if traceless := listed([key for key in TRACELESS if arguments.get(key) is not None]):
        raise UserError(
            f"{path} records {traceless} of its network, which only embed, knn, linear-probe and "
            "evaluate can follow, and only for a folder that timm or transformers saved"
        )


def timm_classes(path: Path) -> list[str] | None:
    """Return the class names that timm records for a model, in the order of its head."""
    names = read_timm_config(path).get("label_names")
    names = {str(n): name for n, name in enumerate(names)} if isinstance(names, list) else names
    return numbered_names(names)
