"""The section `model` of a configuration."""

import re
from dataclasses import dataclass
from typing import Literal

from mae_et.config.keys import key
from mae_et.config.model_names import suggest_model
from mae_et.errors import UserError, require, require_in

Target = Literal["pixel", "norm_pix", "hog"]
Attention = Literal["self", "cross"]
Pool = Literal["mean", "cls"]
Positions = Literal["full_grid", "own_grid"]
_NAMED_PATCH = re.compile(r"patch([1-9]\d{0,3})(?!\d)")


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder."""

    encoder: str = key("vit_base_patch16_224", "common")
    """Name of a timm VisionTransformer with a class token."""
    image_size: int = key(224, "common")
    """Base size: side of the full-spectrum input, in pixels."""
    patch_size: int | None = None
    """Side of a patch, in pixels; read from the encoder's name when not given."""
    channels: int = 3
    """Channels of the images."""
    encoder_embed_dim: int | None = None
    """Overrides the encoder's width."""
    encoder_depth: int | None = None
    """Overrides the encoder's number of blocks."""
    encoder_num_heads: int | None = None
    """Overrides the encoder's number of heads."""
    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_num_heads: int = 16
    """Heads of the decoder."""
    decoder_attention: Attention = "self"
    """self: mask tokens attend to all tokens (MAE); cross: to the visible ones (after CrossMAE,
    whose release also mixes the encoder's layers for each of its 8 or 12 decoder blocks)."""
    decoder_share: float = 1.0
    """Fraction of the masked patches that a step predicts, drawn at random (as in CrossMAE, whose
    release scales the learning rate by it: optim.scale_lr_by_decoder_share); all of them in MAE."""
    positions: Positions = "full_grid"
    """Grid that positions are laid on: the base size's, or, for ablations, the smaller one of the
    input itself."""
    position_grid: int | None = None
    """Side of the grid of full_grid, in patches, if it is not the base size's: that of initial
    weights of another base size or patch, which mae-et pretrain --init inherits."""
    mask_ratio: float = key(0.75, "common")
    """Fraction of patches to mask."""
    target: Target = key("norm_pix", "common")
    """Prediction target of a masked patch."""
    hog_cell: int = 8
    """Side of a HOG cell, in pixels; must divide the patch."""
    hog_bins: int = 9
    """Orientations of a HOG histogram."""

    def __post_init__(self) -> None:
        self._require_of_patch(
            self.patch_size is not None or _NAMED_PATCH.search(self.encoder) is not None,
            f"model.patch_size is needed: the name {self.encoder!r} does not contain it",
        )
        require_in(
            "(0, inf)", self, "model.encoder_embed_dim", "model.encoder_num_heads",
            "model.image_size", "model.channels", "model.decoder_embed_dim",
            "model.decoder_num_heads", "model.hog_cell", "model.hog_bins", "model.patch_size",
            "model.position_grid",
        )  # fmt: skip
        # Without a limit, blocks would be built until memory runs out.
        require_in("[1, 1000]", self, "model.encoder_depth", "model.decoder_depth")
        require_in("(0, 1)", self, "model.mask_ratio")
        require_in("(0, 1]", self, "model.decoder_share")
        require(
            self.position_grid is None or self.positions == "full_grid",
            "model.position_grid needs model.positions full_grid",
        )
        self._require_of_patch(
            self.image_size % self.patch == 0,
            f"model.image_size {self.image_size} is not a multiple of the patch size {self.patch}",
        )
        require(
            self.decoder_embed_dim % self.decoder_num_heads == 0
            and self.decoder_embed_dim % 4 == 0,
            f"model.decoder_embed_dim {self.decoder_embed_dim} must be a multiple of 4 and of "
            f"model.decoder_num_heads {self.decoder_num_heads}",
        )
        self._require_of_patch(
            self.target != "hog" or self.patch % self.hog_cell == 0,
            f"model.hog_cell {self.hog_cell} does not divide the patch size {self.patch}",
        )

    def _require_of_patch(self, condition: bool, sentence: str) -> None:
        """Raise `UserError` unless a condition holds; the encoder's name may be misspelt."""
        if not condition:
            raise UserError(sentence + suggest_model(self.encoder, "patch"))

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        if self.patch_size is not None:
            return self.patch_size
        return int(_NAMED_PATCH.findall(self.encoder)[0])

    @property
    def target_width(self) -> int:
        """D, the size of one patch's target."""
        if self.target == "hog":
            return self.channels * self.hog_bins * (self.patch // self.hog_cell) ** 2
        return self.channels * self.patch**2


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Return how many of N patches stay visible: V = floor(N * (1 - mask ratio)).

    Raises:
        ValueError: none would stay visible, or none would be hidden.
    """
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ValueError(
            f"a mask ratio of {mask_ratio} leaves {visible} of {patches} patches visible; at least "
            "one must be visible and one hidden"
        )
    return visible
