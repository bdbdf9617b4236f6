"""A plain masked autoencoder, the reference for the speed of mae-et.

The usual implementation: a convolution embeds all patches, then the visible ones are gathered; the
decoder and its head run on all tokens; float32; torch's default AdamW. Blocks are timm's, with
fused attention. The target is normalised pixels.
"""

from typing import Any

import timm
import torch
from einops import rearrange, repeat
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_et.models.pos_embed import sincos_positions


class PlainAutoencoder(nn.Module):
    """A masked autoencoder without optimisations; width, depth and heads are of its decoder."""

    encoder: Any  # timm's modules have no static types
    decoder_positions: Tensor

    def __init__(self, encoder: str, size: int, width: int, depth: int, heads: int):
        super().__init__()
        vit: Any = timm.create_model(encoder, num_classes=0, img_size=size)
        self.encoder, self.patch = vit, int(vit.patch_embed.patch_size[0])
        self.embed = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        block = [
            Block(width, heads, 4.0, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*block)
        self.norm = LayerNorm(width)
        self.pred = nn.Linear(width, self.patch**2 * 3)
        grid = vit.patch_embed.grid_size
        for name, channels in (("positions", vit.embed_dim), ("decoder_positions", width)):
            self.register_buffer(name, sincos_positions(grid, grid, channels, torch.device("cpu")))

    def forward(self, images: Tensor, noise: Tensor, visible: int) -> Tensor:
        """Images [B 3 H W], noise [B N] -> loss []."""
        batch, patches = noise.shape
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        mask = (restore >= visible).float()
        tokens = self.encoder.patch_embed(images) + self.positions
        tokens = tokens.gather(1, repeat(order[:, :visible], "b v -> b v d", d=tokens.shape[-1]))
        cls_token = self.encoder.cls_token.expand(batch, -1, -1)
        tokens = self.encoder.norm(self.encoder.blocks(torch.cat([cls_token, tokens], dim=1)))

        tokens = self.embed(tokens)
        masked = self.mask_token.expand(batch, patches - visible, -1)
        everything = torch.cat([tokens[:, 1:], masked], dim=1)
        everything = everything.gather(1, repeat(restore, "b n -> b n d", d=tokens.shape[-1]))
        everything = torch.cat([tokens[:, :1], everything + self.decoder_positions], dim=1)
        prediction = self.pred(self.norm(self.blocks(everything)))[:, 1:]

        target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()
