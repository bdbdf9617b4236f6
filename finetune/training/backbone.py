"""Build a timm model as a backbone, and load a checkpoint of the same model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from finetune.config import NetworkConfig
from finetune.training.swin import follow_image_size
from mae_et.checkpoints.encoders import classifier_prefixes, read_weights_of
from mae_et.checkpoints.layouts.hugging_face_config import activation_of, norm_eps_of
from mae_et.checkpoints.layouts.other_names import recognise_network
from mae_et.checkpoints.layouts.timm_config import refuse_traceless, timm_arguments, timm_classes
from mae_et.checkpoints.layouts.timm_conversion import converted_by_timm
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.state_dicts import check_finite, describe_mismatch
from mae_et.config.model_names import suggest_model
from mae_et.errors import UserError, listed, one_line
from mae_et.models.encoder import check_settings_of
from mae_et.runtime.console import notify

# Projection heads of self-supervised training (SwAV, MoCo, BYOL, SimSiam, Barlow Twins).
PROJECTIONS = ("projection_head.", "prototypes.", "projector.", "predictor.")


def build_backbone(
    config: NetworkConfig, classes: int, described: dict[str, Any] | None = None
) -> nn.Module:
    """Build the timm model named in a config, or that of a description (see `describe_backbone`).

    Raises:
        UserError: timm cannot build it, or the checkpoint does not fit it.
    """
    network = _create(config, classes, described)
    follow_image_size(network, config.image_size)
    if config.checkpoint is not None:
        _load_checkpoint(network, config.checkpoint, config.checkpoint_key, str(config.backbone))
    return network


def describe_backbone(name: str, network: Any) -> dict[str, Any] | None:
    """Describe a network by its architecture, whose name (`hf-hub:...`) may be gone later.

    None for a name that is an architecture's.
    """
    if ":" not in name:
        return None
    architecture = network.default_cfg["architecture"]
    return {"architecture": architecture, "arguments": getattr(network, "_model_args", {})}


def _create(config: NetworkConfig, classes: int, described: dict[str, Any] | None) -> nn.Module:
    name, arguments = config.backbone, {}
    if described is not None:
        name, arguments = described["architecture"], described["arguments"]
        check_settings_of(name, arguments)
    assert name is not None
    common: dict[str, Any] = arguments | {
        "pretrained": config.pretrained,
        "num_classes": classes,
        "in_chans": config.channels,
        # Not every network accepts these arguments.
        **({"drop_path_rate": config.drop_path} if config.drop_path else {}),
        **({"drop_rate": config.head_dropout} if config.head_dropout else {}),
    }
    # These make positions and windows follow the image size; convolutional networks have neither.
    sized = {"img_size": config.image_size, "dynamic_img_size": True}
    try:
        return _create_accepting(name, common, sized)
    except Exception as error:  # unknown name, unreachable hub
        for key, argument in (("drop_path", "drop_path_rate"), ("head_dropout", "drop_rate")):
            if repr(argument) in str(error):
                raise UserError(f"model.{key}: timm's {name} has none ({argument})") from error
        raise UserError(
            f"timm cannot build model.backbone {name!r}: {one_line(error)}{suggest_model(name)}"
        ) from error


def _create_accepting(name: str, needed: dict[str, Any], wanted: dict[str, Any]) -> nn.Module:
    """Create a timm model with all `needed` arguments, and those `wanted` that it accepts."""
    try:
        return timm.create_model(name, **(needed | wanted))
    except TypeError as error:
        # Signatures do not show them: timm's functions hand their keywords on.
        message = str(error) if "keyword argument" in str(error) else ""
        left = {key: value for key, value in wanted.items() if repr(key) not in message}
        if left == wanted:
            raise
    return _create_accepting(name, needed, left)


def _load_checkpoint(network: Any, checkpoint: Path, key: str | None, name: str) -> None:
    """Load a checkpoint of the same timm model, without mismatched heads and projection heads.

    Weights of another image or patch size are resampled by timm's own functions.
    """
    source = recognise(checkpoint, key)
    about = source.description()
    arguments = timm_arguments(checkpoint, network.default_cfg["architecture"])
    refuse_traceless(checkpoint, arguments | activation_of(about, checkpoint))
    heads, ours = classifier_prefixes(network), network.state_dict()
    theirs = read_weights_of(network, source)
    kept, cause = _without_mismatched_head(theirs, ours, heads), None
    if describe_mismatch(kept, ours, may_lack=heads):
        try:
            theirs = converted_by_timm(theirs, network)
        except UserError as error:
            raise UserError(f"timm cannot read {checkpoint} as {name}: {error}") from error
        except Exception as error:  # weights of another network, reported below
            cause = error
        kept = _without_mismatched_head(theirs, ours, heads)
    projections = [n for n in kept if n not in ours and n.startswith((*PROJECTIONS, *heads))]
    mismatch = describe_mismatch(kept, ours, may_lack=heads, may_have=tuple(projections))
    if mismatch:
        what, advice = recognise_network(theirs) or ("", "--model.backbone")
        if "--model.backbone" not in advice:  # timm has no such network
            raise UserError(f"{checkpoint} holds {what}: {advice}")
        raise UserError(f"{name} and {checkpoint} differ: {mismatch}") from cause
    if projections:
        notify(f"{checkpoint}: its projection is not used ({listed(projections)})")
    check_finite(checkpoint, kept, ours)
    network.load_state_dict(kept, strict=False)
    eps = norm_eps_of(about)
    if eps and (own := {p.eps for p in network.modules() if isinstance(p, nn.LayerNorm)} - {eps}):
        notify(f"{checkpoint} has layer norms of epsilon {eps}, {name} of {listed(sorted(own))}")
    if any(name.startswith(heads) for name in kept if name in ours):
        report_kept_head(checkpoint, timm_classes(checkpoint) or (), network.num_classes)


def report_kept_head(checkpoint: Path, names: Sequence[str], classes: int) -> None:
    """Report that training starts from a checkpoint's head, whose classes may differ."""
    named = f" ({listed(names, 3)})" if names else ""
    notify(f"the head of {checkpoint} is kept: it also has {classes} classes{named}")


def _without_mismatched_head(
    theirs: dict[str, Tensor], ours: dict[str, Tensor], heads: tuple[str, ...]
) -> dict[str, Tensor]:
    """Drop the tensors of a head with another number of classes."""
    return {
        key: tensor
        for key, tensor in theirs.items()
        if not (key.startswith(heads) and key in ours and ours[key].shape != tensor.shape)
    }
