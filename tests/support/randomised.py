"""Networks whose every parameter counts, and images for them."""

from typing import Any

import torch


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value that matters, so that no part can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def images_for(network: Any) -> torch.Tensor:
    """Return two images of noise, of the channels and the size that a timm model takes."""
    generator = torch.Generator().manual_seed(1)
    channels = network.patch_embed.proj.in_channels
    return torch.randn(2, channels, *network.patch_embed.img_size, generator=generator)
