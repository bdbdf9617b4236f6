"""Entry points of `torch.hub`: torch.hub.load(REPOSITORY, "mae_encoder", "runs/pretrain").

Source: https://pytorch.org/docs/stable/hub.html
"""

from typing import Any

from torch import nn

dependencies = [
    "torch", "torchvision", "timm", "einops", "jsonargparse", "lazy_loader", "safetensors", "yaml",
]  # fmt: skip


def mae_encoder(path_or_name: str, pretrained: bool = True, **settings: Any) -> nn.Module:
    """Return an encoder as a timm VisionTransformer without a head, in evaluation mode.

    Args:
        path_or_name: run folder, checkpoint, weights in MAE's or timm's layout, Hugging Face
            folder, or the name of a timm model.
        pretrained: whether to load weights; without them `path_or_name` is a timm name, and
            `settings` go to `timm.create_model`.
        settings: with weights, see `mae_et.load_encoder`.
    """
    if pretrained:
        from mae_et import load_encoder

        return load_encoder(path_or_name, **settings)
    from mae_et.models.encoder import create_vit

    return create_vit(path_or_name, **{"num_classes": 0} | settings).eval()


def masked_autoencoder(
    path_or_name: str | None = None, pretrained: bool = True, **settings: Any
) -> nn.Module:
    """Return a masked autoencoder: encoder, and decoder if the checkpoint has one.

    Args:
        path_or_name: run folder, checkpoint, released MAE weights or Hugging Face folder; without
            weights the name of a timm encoder, ViT-B/16 by default.
        pretrained: whether to load weights.
        settings: with weights, see `mae_et.load_pretrained`; without, `mae_et.MaskedAutoencoder`.
    """
    from mae_et import MaskedAutoencoder, UserError, load_pretrained

    if not pretrained:
        return MaskedAutoencoder(path_or_name or "vit_base_patch16_224", **settings)
    if path_or_name is None:
        raise UserError("give the checkpoint's path, or pretrained=False")
    return load_pretrained(path_or_name, **settings)
