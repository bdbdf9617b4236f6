"""FLOPs of a masked autoencoder from its sizes, before PyTorch is loaded.

They equal the FLOPs counted in the network (`tests/curriculum/test_flops.py`).
"""

from collections.abc import Callable

from mae_et.config.model import ModelConfig, visible_patches

FORWARD_AND_BACKWARD = 3
"""The backward pass computes two products for each product of the forward pass."""
ENCODERS = {
    "vit_tiny_patch16_224": (192, 12, 3),
    "vit_small_patch16_224": (384, 12, 6),
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
    "vit_huge_patch14_224": (1280, 32, 16),
}
"""Width, depth and heads of timm's models, by name."""


def mae_training_flops(config: ModelConfig) -> Callable[[int], float] | None:
    """Return a function from a bandwidth to the FLOPs of one image's training step.

    A multiply-add counts as two FLOPs, and the backward pass as twice the forward pass. The decoder
    is MAE's and predicts every patch, as published. Training skips the patches outside the loss,
    which saves 3% of ViT-Ti's FLOPs, 1.8% of ViT-B's and 0.4% of ViT-H's. None for other encoders
    and decoders, whose FLOPs must be counted in the network.
    """
    sizes = _encoder_sizes(config)
    if sizes is None or config.decoder_attention != "self" or config.decoder_share < 1:
        return None
    (width, depth), decoder = sizes, config.decoder_embed_dim
    patch, pixels = config.patch, config.channels * config.patch**2

    def flops(bandwidth: int) -> float:
        patches = (bandwidth // patch) ** 2
        visible = visible_patches(patches, config.mask_ratio)
        embeddings = visible * pixels * width + (visible + 1) * width * decoder
        blocks = depth * _block(visible + 1, width)
        blocks += config.decoder_depth * _block(patches + 1, decoder)
        products = embeddings + blocks + (patches + 1) * decoder * config.target_width
        return float(FORWARD_AND_BACKWARD * 2 * products)

    return flops


def _encoder_sizes(config: ModelConfig) -> tuple[int, int] | None:
    """Return the width and depth of an encoder; None for one that timm must build or refuse."""
    if config.encoder not in ENCODERS:
        return None
    overrides = (config.encoder_embed_dim, config.encoder_depth, config.encoder_num_heads)
    own = ENCODERS[config.encoder]
    width, depth, heads = (given or size for given, size in zip(overrides, own, strict=True))
    return None if width % heads or width % 4 else (width, depth)


def _block(tokens: int, width: int) -> int:
    """Return the multiply-adds of a ViT block whose MLP is four times as wide."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width
