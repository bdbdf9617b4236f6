"""Decoders: predict masked patches from the encoder's features of the visible ones.

`self` is MAE's decoder: self-attention over visible and mask tokens. `cross` is after CrossMAE (Fu
et al., 2024, arXiv 2401.14391): mask tokens cross-attend to the visible tokens only, so each patch
is predicted independently and any fraction of them can be. Two parts of CrossMAE's release are not
reproduced: its decoder blocks attend to learned mixtures of all encoder layers, of encoder width
and without positions; ours attend to the last layer, projected to decoder width, with positions.
Changes to the layers must be repeated in `mae_et/curriculum/mae_cost.py`, which counts their FLOPs.

B batch, N patches, V visible patches, M predicted patches, D numbers per patch, W width.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_et.config.model import Attention, ModelConfig
from mae_et.models.masking import Mask
from mae_et.models.pos_embed import Grid, sincos_positions


class Decoder(nn.Module, ABC):
    """Base of all decoders: embedding, mask token, positions, blocks, norm and head.

    Positions are sampled on `position_grid`, or, if it is None, on the input's own.
    """

    attention: Attention

    def __init__(self, config: ModelConfig, encoder_embed_dim: int, position_grid: Grid | None):
        super().__init__()
        width, heads = config.decoder_embed_dim, config.decoder_num_heads
        self.position_grid = position_grid
        self.embed = nn.Linear(encoder_embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(self.block(width, heads) for _ in range(config.decoder_depth))
        )
        self.norm = LayerNorm(width)
        self.pred = nn.Linear(width, config.target_width)
        self.gradient_checkpointing = False

    @abstractmethod
    def block(self, width: int, heads: int) -> nn.Module:
        """Build one block."""

    @abstractmethod
    def decode(self, tokens: Tensor, queries: Tensor, count: int | None) -> Tensor:
        """Decode patches.

        Args:
            tokens: class and visible tokens, [B 1+V W].
            queries: mask tokens of the visible patches, then of the masked ones, [B V+M W].
            count: M, to decode only the masked ones.

        Returns:
            [B M W]; without `count`, of all patches, after the class token if it is decoded too.
        """

    def forward(self, latent: Tensor, mask: Mask, grid: Grid, count: int | None = None) -> Tensor:
        """Predict patches.

        Args:
            latent: encoded class token and visible patches, [B 1+V width].
            mask: the mask that the encoder saw.
            grid: rows and columns of patches.
            count: M; the masked patches with the least noise are predicted. By default, every patch
                is; the predictions of visible ones are untrained.

        Returns:
            Predictions [B M D] of the patches `mask.order[:, V : V + M]`, or [B N D] of every patch
            in raster order.
        """
        tokens = self.embed(latent)
        order = mask.order if count is None else mask.order[:, : mask.visible + count]
        table = sincos_positions(grid, self.position_grid or grid, tokens.shape[-1], tokens.device)
        positions = table.to(self.mask_token.dtype)[order]
        # The class token's position is zero, as in MAE.
        cls_token, tokens = tokens.split([1, mask.visible], dim=1)
        tokens = torch.cat([cls_token, tokens + positions[:, : mask.visible]], dim=1)
        queries = self.mask_token.to(tokens.dtype) + positions
        predicted = self.pred(self.norm(self.decode(tokens, queries, count)))
        if count is not None:
            return predicted
        return gather(predicted[:, -order.shape[1] :], mask.restore)

    def _run(self, block: nn.Module, *tokens: Tensor | int | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, use_reentrant=False)
        return block(*tokens)


class SelfDecoder(Decoder):
    """MAE's decoder. Self-attention is permutation-equivariant, so tokens stay in mask order."""

    attention = "self"

    def block(self, width: int, heads: int) -> nn.Module:
        """Build a ViT block."""
        return SelfBlock(width, heads, 4.0, qkv_bias=True, norm_layer=LayerNorm)

    def decode(self, tokens: Tensor, queries: Tensor, count: int | None) -> Tensor:
        """Run the blocks; the last one's MLP computes only the tokens that the head reads."""
        masked = queries[:, tokens.shape[1] - 1 :].to(tokens.dtype)
        tokens = torch.cat([tokens, masked], dim=1)
        for block in self.blocks[:-1]:
            tokens = self._run(block, tokens)
        return self._run(self.blocks[-1], tokens, count)


class SelfBlock(Block):
    """timm's block, which can compute the MLP of the last tokens only."""

    def forward(  # type: ignore[override]  # no attention masks
        self, tokens: Tensor, last: int | None = None
    ) -> Tensor:
        """[B N W] -> [B N W], or [B M W] if only the last M tokens are needed."""
        if last is None:
            return super().forward(tokens)
        tokens = tokens + self.drop_path1(self.ls1(self.attn(self.norm1(tokens))))
        tokens = tokens[:, -last:]
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))


class CrossDecoder(Decoder):
    """CrossMAE's decoder: mask tokens attend to visible tokens, which are not updated."""

    attention = "cross"

    def block(self, width: int, heads: int) -> nn.Module:
        """Build a cross-attention block."""
        return CrossBlock(width, heads)

    def decode(self, tokens: Tensor, queries: Tensor, count: int | None) -> Tensor:
        """Run the blocks."""
        queries = queries if count is None else queries[:, -count:]
        for block in self.blocks:
            queries = self._run(block, queries, tokens)
        return queries


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm_context, self.norm2 = (LayerNorm(width) for _ in range(3))
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """[B M W], [B 1+V W] -> [B M W]."""
        query = rearrange(self.query(self.norm1(queries)), "b m (h d) -> b h m d", h=self.heads)
        key_value = self.key_value(self.norm_context(context))
        key, value = rearrange(key_value, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        queries = queries + self.proj(rearrange(attended, "b h m d -> b m (h d)"))
        return queries + self.mlp(self.norm2(queries))


DECODERS: dict[Attention, type[Decoder]] = {"self": SelfDecoder, "cross": CrossDecoder}


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """[B N D], [B M] -> [B M D]."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
