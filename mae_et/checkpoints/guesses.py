"""Report what is not read of a checkpoint, and what is assumed because it records nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mae_et.errors import listed
from mae_et.runtime.console import notify

if TYPE_CHECKING:
    from mae_et.checkpoints.weights import Weights

DEFAULT_EPS = 1e-6
"""Epsilon of the layer norms of timm's ViTs."""
NAME_IT = "give its timm model with --architecture"


def report_unread(path: Path, names: Sequence[str]) -> None:
    """Report tensors that are not read, in one line with their number."""
    if names:
        notify(f"{path}: tensors that are not read: {len(names)} ({listed(names, 3)})")


def report_assumed_blocks(weights: "Weights", architecture: str) -> None:
    """Report that the blocks of a ViT are assumed to be those of an architecture, unless recorded.

    Several networks have the tensors of a plain ViT, and differ in what tensors do not show.
    """
    path = weights.path
    if weights.model is None and weights.norm_eps is None and weights.architecture == architecture:
        notify(
            f"{path} records neither activation nor epsilon: GELU and {DEFAULT_EPS} are taken, as "
            f"in most vision transformers (if not, {NAME_IT})"
        )
    if not {"norm.weight", "fc_norm.weight"} & weights.encoder.keys():
        notify(f"{path} has no norm after the last block: none is applied")
