"""The value that every checkpoint reader returns."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.run_config import DEFAULT_ENCODER
from mae_et.checkpoints.state_dicts import Tensors
from mae_et.checkpoints.weight_files import (
    CLASSIFIER_KEY,
    MODEL_KEY,
    PREPROCESSING_KEY,
    SETTINGS_KEY,
)
from mae_et.config.files import plain
from mae_et.config.model import ModelConfig, Target
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.models.encoder import heads_of_vit
from mae_et.runtime.console import notify

DEFAULT_EPS = 1e-6
"""Epsilon of the layer norms of timm's ViTs."""
NAME_IT = "give its timm model with --architecture"
# Settings of a ViT or its decoder that tensor shapes do not show, and their types.
SETTINGS: dict[str, tuple[type, ...]] = {
    "encoder_num_heads": (int,), "decoder_num_heads": (int,), "norm_eps": (int, float),
    "target": (),
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights under one set of names, with the settings recorded beside them."""

    path: Path
    encoder: Tensors
    """timm's names."""
    decoder: Tensors = field(default_factory=dict)
    """Our names; empty without a decoder."""
    head: Tensors = field(default_factory=dict)
    """A classifier's weight and bias, and the running_mean and running_var of a linear probe's
    normalisation; empty without a head."""
    model: ModelConfig | None = None
    """The model's config, if it is recorded."""
    config: PretrainConfig | None = None
    """The run's config, in our own checkpoints and run folders; its data are read-only."""
    architecture: str = DEFAULT_ENCODER
    """timm's name of a ViT that differs from the encoder only in sizes."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, if they are recorded."""
    decoder_num_heads: int | None = None
    """Heads of the decoder, if they are recorded."""
    norm_eps: float | None = None
    """Epsilon of the encoder's layer norms, if it is recorded."""
    target: Target | None = None
    """The decoder's target, if it is recorded."""
    grid: Sequence[int] | None = None
    """Rows and columns of the position table, if they are recorded."""
    classes: Sequence[str] | None = None
    """A classifier's class names, if they are recorded."""
    preprocessing: Preprocessing | None = None
    """Statistics and sizes of the images, if they are recorded."""

    def with_given(
        self,
        encoder_num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        target: Target | None = None,
    ) -> "Weights":
        """Add heads given by a caller, and a target; refuse others than our own config records."""
        own = getattr(self.model, "target", None)
        if target and own not in {None, target}:
            raise UserError(f"target {target}: {self.path} records {own}")
        given = {"encoder_num_heads": encoder_num_heads, "decoder_num_heads": decoder_num_heads}
        heads: dict[str, Any] = {}
        for key, number in given.items():
            own = getattr(self, key) or getattr(self.model, key, None)
            if number and own not in {None, number}:
                raise UserError(f"{key} {number}: {self.path} records {own}")
            heads[key] = getattr(self, key) or number
        return replace(self, **heads, target=target or self.target)

    def with_blocks_of(self, name: str | None, arguments: dict[str, Any]) -> "Weights":
        """Take heads and blocks (activations, norms) of a plain timm ViT of the same width."""
        width = len(self.encoder["patch_embed.proj.weight"])
        heads = None if name is None else heads_of_vit(name, width, arguments)
        return replace(self, architecture=name, encoder_num_heads=heads) if name and heads else self

    def report_assumed_blocks(self) -> None:
        """Report that blocks are assumed to be those of `DEFAULT_ENCODER`, unless recorded.

        Several networks have the tensors of a plain ViT, and differ in what tensors do not show.
        """
        recorded = self.model is not None or self.norm_eps is not None
        if not recorded and self.architecture == DEFAULT_ENCODER:
            notify(
                f"{self.path} records neither activation nor epsilon: GELU and {DEFAULT_EPS} are "
                f"taken, as in most vision transformers (if not, {NAME_IT})"
            )
        if not {"norm.weight", "fc_norm.weight"} & self.encoder.keys():
            notify(f"{self.path} has no norm after the last block: none is applied")

    def with_settings(self, text: str) -> "Weights":
        """Add the settings that `entries` wrote.

        Raises:
            ValueError: one is unknown, or has another type.
        """
        settings = json.loads(text)
        for key, value in settings.items():
            is_number = type(value) in SETTINGS.get(key, ()) and 0 < value < math.inf
            if not (value in get_args(Target) if key == "target" else is_number):
                raise ValueError(f"{key} is {value!r}")
        return replace(self, **settings)

    def entries(self) -> dict[str, str]:
        """Return the settings that our readers need beside the tensors: JSON by key in the file."""
        entries = {}
        if self.model is not None:
            entries[MODEL_KEY] = json.dumps(plain(self.model))
        settings = {key: getattr(self, key) for key in SETTINGS}
        known = {key: value for key, value in settings.items() if value is not None}
        if known and self.model is None:
            entries[SETTINGS_KEY] = json.dumps(known)
        if self.preprocessing is not None:
            entries[PREPROCESSING_KEY] = json.dumps(asdict(self.preprocessing))
        if self.classes is not None:
            description = {
                "classes": list(self.classes),
                "encoder": self.architecture,
                "encoder_num_heads": self.encoder_num_heads,
                "grid": None if self.grid is None else list(self.grid),
            }
            entries[CLASSIFIER_KEY] = json.dumps(description)
        return entries
