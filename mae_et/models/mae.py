"""The masked autoencoder: a timm VisionTransformer on visible patches, and a light decoder.

B batch, C channels, H W image size, p q patch, N patches, V visible patches, M predicted patches,
D numbers per patch.

Source: MAE (He et al., CVPR 2022, arXiv 2111.06377). The patch grid follows the input's size, so
stages of different bandwidths share all weights. Changes to the layers must be repeated in
`mae_et/curriculum/mae_cost.py`, which counts their FLOPs.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import checkpoint_seq
from torch import Tensor, nn

from mae_et.config.model import Attention, ModelConfig, Positions, Target
from mae_et.config.typed import typed
from mae_et.models.decoders import DECODERS, Decoder, gather
from mae_et.models.encoder import build_plain_vit, warn_of_other_positions
from mae_et.models.masking import Mask, mask_from_noise
from mae_et.models.pos_embed import Grid, sincos_positions
from mae_et.models.targets import TARGETS, check_tiled


class Reconstruction(NamedTuple):
    """The result of a forward pass."""

    loss: Tensor
    """float32 []: mean squared error over the masked patches, or the predicted ones among them."""
    prediction: Tensor
    """[B M D] for the patches in the loss, or [B N D] for every patch in raster order."""
    mask: Mask
    """Which patches the encoder saw; the M predicted ones are `mask.order[:, V : V + M]`."""
    latent: Tensor
    """[B 1+V width]: class token and visible patches, after the encoder's norm."""


class MaskedAutoencoder(nn.Module):
    """A masked autoencoder for images of any size that is a multiple of the patch.

    The encoder is a timm VisionTransformer with timm's parameter names. Weights are initialised as
    in MAE (He et al., CVPR 2022, arXiv 2111.06377).

    Args:
        encoder: name of a timm VisionTransformer with one class token.
        image_size: base size in pixels, an integer or (height, width). It defines the full grid, on
            which the positions of smaller inputs are sampled.
        patch_size: side of a patch in pixels; by default the encoder's own.
        channels: C.
        encoder_embed_dim: width of the encoder; by default the architecture's.
        encoder_depth: number of encoder blocks; by default the architecture's.
        encoder_num_heads: number of encoder heads; by default the architecture's.
        decoder_embed_dim: width of the decoder, a multiple of 4 and of its heads.
        decoder_depth: number of decoder blocks; 0 builds the encoder only.
        decoder_num_heads: number of decoder heads.
        decoder_attention: `self` (MAE) or `cross` (after CrossMAE, see `mae_et.models.decoders`).
        decoder_share: fraction of the masked patches that a pass predicts, in (0, 1].
        positions: `full_grid` samples the positions of a smaller grid on the full one; `own_grid`
            gives each grid its own table, as a plain MAE of that size has (for comparison).
        position_grid: side of the full grid in patches; by default that of `image_size`.
        mask_ratio: fraction of the patches to mask, in (0, 1), in passes that name no other.
        target: what is predicted of a patch, a key of `mae_et.models.targets.TARGETS`.
        hog_cell: side of a HOG cell in pixels; with target `hog` it must divide the patch.
        hog_bins: number of orientations of a HOG histogram.

    Raises:
        UserError: timm does not know the encoder, it is not a plain ViT with one class token, or an
            argument is outside the values given above.
    """

    def __init__(
        self,
        encoder: str = "vit_base_patch16_224",
        image_size: int | tuple[int, int] = 224,
        patch_size: int | None = None,
        channels: int = 3,
        encoder_embed_dim: int | None = None,
        encoder_depth: int | None = None,
        encoder_num_heads: int | None = None,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_attention: Attention = "self",
        decoder_share: float = 1.0,
        positions: Positions = "full_grid",
        position_grid: int | None = None,
        mask_ratio: float = 0.75,
        target: Target = "norm_pix",
        hog_cell: int = 8,
        hog_bins: int = 9,
    ):
        # All arguments: they are the fields of a config.
        given = {k: v for k, v in locals().items() if k in ModelConfig.__dataclass_fields__}
        super().__init__()
        self.encoder = build_plain_vit(
            encoder, image_size, channels, patch_size=patch_size, embed_dim=encoder_embed_dim,
            depth=encoder_depth, num_heads=encoder_num_heads,
        )  # fmt: skip
        self.patch: int = self.encoder.patch_embed.patch_size[0]
        given |= {"patch_size": self.patch, "decoder_depth": decoder_depth or 1}
        for side in self.encoder.patch_embed.img_size:  # refuses impossible values, of both
            config = typed(ModelConfig(**given | {"image_size": side}), ModelConfig)
        self.base_grid: Grid = self.encoder.patch_embed.grid_size
        extent = (position_grid, position_grid) if position_grid else self.base_grid
        self.position_grid = extent if positions == "full_grid" else None
        check = partial(warn_of_other_positions, self.base_grid, extent)
        self.encoder.register_load_state_dict_pre_hook(check)
        self.channels, self.target = channels, target
        self.mask_ratio, self.decoder_share = mask_ratio, decoder_share
        self.patch_target = TARGETS[target](config)
        self.decoder: Decoder | None = None
        if decoder_depth:
            build_decoder = DECODERS[decoder_attention]
            self.decoder = build_decoder(config, self.encoder.embed_dim, self.position_grid)
        initialise(self)

    @classmethod
    def from_config(cls, config: ModelConfig, decoder: bool = True) -> "MaskedAutoencoder":
        """Build the model of a config; without `decoder`, its encoder only."""
        return cls(**vars(config) | ({} if decoder else {"decoder_depth": 0}))

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass to save memory."""
        self.encoder.set_grad_checkpointing(enabled)
        if self.decoder is not None:
            self.decoder.gradient_checkpointing = enabled

    def grid(self, images: Tensor) -> Grid:
        """Return the rows and columns of patches in images [B C H W]."""
        return images.shape[-2] // self.patch, images.shape[-1] // self.patch

    def encode(self, images: Tensor, mask: Mask | None = None) -> Tensor:
        """Encode normalised images [B C H W], or their visible patches only -> [B 1+V width].

        Patches are multiplied by the weights of `patch_embed.proj`, whose hooks are not called.

        Raises:
            ValueError: the images are not tiled by patches, or the mask is of other patches.
        """
        check_tiled(images, self.patch)
        embed = self.encoder.patch_embed.proj
        grid = self.grid(images)
        laid_over, width = self.position_grid or grid, self.encoder.embed_dim
        positions = sincos_positions(grid, laid_over, width, images.device).to(embed.weight.dtype)
        # Masked patches are dropped before the embedding: at 75% this saves three quarters of it.
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        if mask is not None:
            if mask.order.shape != pixels.shape[:2]:  # otherwise, patches would be lost
                found, own = list(mask.order.shape), list(pixels.shape[:2])
                raise ValueError(f"the mask is of {found} patches, the images have {own}")
            pixels, positions = gather(pixels, mask.keep), positions[mask.keep]
        weight = rearrange(embed.weight, "d c p q -> d (c p q)")
        patches = F.linear(pixels, weight, embed.bias) + positions
        assert self.encoder.cls_token is not None
        cls_token = self.encoder.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)
        if self.encoder.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint_seq(self.encoder.blocks, tokens)
        else:
            tokens = self.encoder.blocks(tokens)
        return self.encoder.norm(tokens)

    def forward(
        self,
        images: Tensor,
        mask: Mask | float | None = None,
        *,
        every_patch: bool = False,
    ) -> Reconstruction:
        """Mask patches, reconstruct them, and return the loss with the prediction and mask.

        Args:
            images: normalised images [B C H W]; H and W are multiples of the patch.
            mask: patches to mask (`mask_from_noise`), or the fraction to mask at random, from
                torch's global generator; by default the model's `mask_ratio`.
            every_patch: predict every patch, for pictures, and compute the loss over all masked
                ones; by default only the patches in the loss, `decoder_share` of the masked ones.

        Raises:
            ValueError: the images are not tiled by patches, the mask is of other patches, or all
                patches or none would be masked.
            RuntimeError: the model has no decoder (it was loaded from an encoder-only file).
        """
        if self.decoder is None:
            raise RuntimeError("this model has no decoder: it can encode but not reconstruct")
        grid = self.grid(images)
        if not isinstance(mask, Mask):
            noise = torch.rand(len(images), grid[0] * grid[1], device=images.device)
            mask = mask_from_noise(noise, self.mask_ratio if mask is None else mask)
        latent = self.encode(images, mask)
        target = self.targets(images)
        if every_patch:
            prediction = self.decoder(latent, mask, grid)
            error = (prediction.float() - target).square().mean(dim=-1)
            loss = (error * mask.hidden).sum() / mask.hidden.sum()
        else:
            count = max(1, round((target.shape[1] - mask.visible) * self.decoder_share))
            prediction = self.decoder(latent, mask, grid, count)
            predicted = mask.order[:, mask.visible : mask.visible + count]
            # Every image has as many masked patches: the mean over all is the mean of image means.
            loss = F.mse_loss(prediction.float(), gather(target, predicted))
        return Reconstruction(loss, prediction, mask, latent)

    def targets(self, images: Tensor) -> Tensor:
        """Return the reconstruction targets of normalised images [B C H W], float32 [B N D]."""
        with torch.no_grad():
            return self.patch_target.compute(images.float())


def initialise(model: MaskedAutoencoder) -> None:
    """Initialise as MAE does: Xavier-uniform linear layers, normal(0.02) tokens."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    embed = model.encoder.patch_embed.proj
    nn.init.xavier_uniform_(embed.weight.view(embed.out_channels, -1))
    nn.init.zeros_(embed.bias)
    assert model.encoder.cls_token is not None
    assert model.encoder.pos_embed is not None
    nn.init.normal_(model.encoder.cls_token, std=0.02)
    if model.decoder is not None:
        nn.init.normal_(model.decoder.mask_token, std=0.02)
    # A frozen parameter, so that the exported encoder is a complete timm model.
    table = model.encoder.pos_embed.requires_grad_(False)
    table.zero_()
    laid_over = model.position_grid or model.base_grid
    table[0, 1:] = sincos_positions(model.base_grid, laid_over, table.shape[-1], table.device)
