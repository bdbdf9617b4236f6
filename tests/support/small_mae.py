"""A masked autoencoder that fits in a millisecond."""

import torch

from mae_et.models.mae import MaskedAutoencoder


def small(**overrides: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings: dict = {
        "image_size": 32, "patch_size": 8, "encoder_embed_dim": 32, "encoder_depth": 2,
        "encoder_num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
    }  # fmt: skip
    return MaskedAutoencoder("vit_tiny_patch16_224", **settings | overrides)
