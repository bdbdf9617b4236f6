"""Swin and Swin V2 under a curriculum: the attention window follows the bandwidth.

EfficientTrain++'s released code sets the window to a 32nd of the image at every stage (3, 5, 7 at
96, 160, 224 pixels), so windows tile each map without padding. With a fixed window of 7, small maps
are zero-padded, which costs 1.4 times the FLOPs; at 96 pixels, 0.81 of the last blocks' attention
goes to the padding.

The release resamples the tables of relative-position biases when the stage changes. Here the base
size's table stays the parameter, and smaller windows interpolate it in each forward pass, so
optimizer moments, moving averages, checkpoints and the evaluation at the base size keep their
shapes. Swin V2 (arXiv 2111.09883) has no tables: a small network computes the biases, and timm's
windows follow the image size, at the published share of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import (
    SwinTransformer,
    WindowAttention,
    get_relative_position_index,
)
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from finetune.image_size import Size, format_size, height_and_width
from mae_et.errors import require

STRIDE = 32
"""Image pixels per token of the last stage, and per token of a Swin window's side."""


class ResamplingAttention(WindowAttention):
    """Window attention that keeps the base window's bias table at every window size."""

    relative_position_index: Tensor
    table_window: tuple[int, int]

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change the window, but not the table."""
        self.window_size = window_size
        self.window_area = window_size[0] * window_size[1]
        device = self.relative_position_bias_table.device
        index = get_relative_position_index(*window_size, device=device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def _get_rel_pos_bias(self) -> Tensor:
        table: Tensor = self.relative_position_bias_table
        if self.window_size != self.table_window:
            table = resample_table(table, self.table_window, self.window_size)
        return rearrange(table[self.relative_position_index], "query key head -> 1 head query key")


def resample_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a table of relative-position biases to another window, differentiably.

    Bicubic as in Swin's own code, with antialiasing, so that each entry has a gradient. The table
    has the offsets in a window (h, w) of tokens, [(2h-1)(2w-1) heads].
    """
    grid = rearrange(table, "(h w) head -> 1 head h w", h=2 * old[0] - 1)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
    return rearrange(grid, "1 head h w -> (h w) head")


def follow_image_size(network: nn.Module, image_size: Size) -> None:
    """Make the windows of a Swin or Swin V2 follow its input's size; ignore other networks.

    The network is built at the base size; Swin's bias table is that of its window, a 32nd of it.

    Raises:
        UserError: the image size is not a multiple of 32 pixels.
    """
    if not isinstance(network, (SwinTransformer, SwinTransformerV2, SwinTransformerV2Cr)):
        return
    height, width = height_and_width(image_size)
    require(
        height % STRIDE == 0 and width % STRIDE == 0,
        f"model.image_size {format_size(image_size)} is not a multiple of {STRIDE}, "
        "which Swin's windows need",
    )
    if isinstance(network, SwinTransformer):
        _share_tables(network, (height, width))
    else:  # V2 computes its biases from the offsets in a window
        network.set_input_size(img_size=(height, width), window_ratio=_windows_per_side(network))
    network.register_forward_pre_hook(_fit_windows)


def _windows_per_side(network: Any) -> int:
    """Return the published number of windows along a side in a Swin V2's first stage."""
    (window, _), *_ = network._ref_window_sizes
    if isinstance(network, SwinTransformerV2Cr):  # timm fits them to img_size
        return int(network._ref_grid_size[0] // window)
    return int(
        network.default_cfg["input_size"][-1] // (network.patch_embed.patch_size[0] * window)
    )


def _share_tables(network: Any, size: tuple[int, int]) -> None:
    """Set a Swin's windows for its base size, and use their bias tables at all sizes."""
    if len(set(network._ref_window_sizes)) == 1:  # Swin-S3 has a separate window for each stage
        window = (size[0] // STRIDE, size[1] // STRIDE)
        network.set_input_size(img_size=size, window_size=window)
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.__class__ = ResamplingAttention
            module.table_window = module.window_size


@torch.compiler.disable
def _fit_windows(network: Any, inputs: tuple[Tensor]) -> None:
    size = tuple(inputs[0].shape[-2:])
    if size != tuple(network.patch_embed.img_size):
        network.set_input_size(img_size=size)  # windows keep their share of the image
