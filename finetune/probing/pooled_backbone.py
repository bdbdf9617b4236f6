"""The pooled features of a timm network without tokens: a ConvNet, Swin and the like."""

from typing import Any

from torch import Tensor, nn


class PooledBackbone(nn.Module):
    """Returns the features before the head as the only token of an image.

    Shapes: B batch, C H W image, D width.
    """

    num_prefix_tokens = 0

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resize the network, if timm can."""
        self.network.set_input_size(img_size=img_size)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B C H W] -> [B 1 D]."""
        maps = self.network.forward_features(images)
        features: Tensor = self.network.forward_head(maps, pre_logits=True)
        return features[:, None]


def kind_of(network: nn.Module) -> str:
    """Return the name of the class of timm's network."""
    return type(network.network if isinstance(network, PooledBackbone) else network).__name__
