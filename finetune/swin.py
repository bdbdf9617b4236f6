"""Swin under a curriculum: the attention window follows the bandwidth.

EfficientTrain++'s released code sets the window to a 32nd of the image at every stage (3, 5, 7 at
96, 160, 224 pixels), so windows tile each map without padding. With a fixed window of 7, small maps
are zero-padded and the padding is attended to: by .81 of the attention of the last blocks at 96
pixels, and at 1.4 times the FLOPs.

The release resamples the tables of relative-position biases when the stage changes. Here the base
size's table stays the parameter, and smaller windows read it through such an interpolation, in
each forward pass. So optimizer moments, moving averages, checkpoints and the evaluation at the base
size need no change of shape.
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
from torch import Tensor, nn

from finetune.image_size import Size, format_size, height_and_width
from mae_et.errors import require

WINDOWS_PER_SIDE = 32
"""Pixels of the image for each token of the window's side, in every published Swin."""


class ResamplingAttention(WindowAttention):
    """Window attention whose bias table stays that of the base window at every window size."""

    relative_position_index: Tensor
    table_window: tuple[int, int]

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change the window, and leave the table."""
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

    Bicubic as in Swin's own code, with antialiasing, so that each entry has a gradient.

    Args:
        table: biases of the offsets in a window, [(2h-1)(2w-1) heads].
        old: its window (h, w), in tokens.
        new: window to resample to.
    """
    grid = rearrange(table, "(h w) head -> 1 head h w", h=2 * old[0] - 1)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
    return rearrange(grid, "1 head h w -> (h w) head")


def follow_image_size(network: nn.Module, image_size: Size) -> None:
    """Make a Swin's windows follow the size of its input; other networks are left unchanged.

    Args:
        network: timm model, built at the base size.
        image_size: base size, multiples of 32 pixels: its window, a 32nd, has the parameters.

    Raises:
        UserError: the image size is not a multiple of 32 pixels.
    """
    if not isinstance(network, SwinTransformer):
        return
    height, width = height_and_width(image_size)
    require(
        height % WINDOWS_PER_SIDE == 0 and width % WINDOWS_PER_SIDE == 0,
        f"model.image_size {format_size(image_size)} is not a multiple of {WINDOWS_PER_SIDE}, "
        "which Swin's windows need",
    )
    model: Any = network
    if len(set(model._ref_window_sizes)) == 1:  # Swin-S3 has windows of its own for each stage
        window = (height // WINDOWS_PER_SIDE, width // WINDOWS_PER_SIDE)
        model.set_input_size(img_size=(height, width), window_size=window)
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.__class__ = ResamplingAttention
            module.table_window = module.window_size
    network.register_forward_pre_hook(_fit_windows)


@torch.compiler.disable
def _fit_windows(network: Any, inputs: tuple[Tensor]) -> None:
    size = tuple(inputs[0].shape[-2:])
    if size != tuple(network.patch_embed.img_size):
        network.set_input_size(img_size=size)  # windows keep their share of the image
