"""Export an encoder to timm and to Hugging Face's transformers, and compare the features.

Seconds on a CPU: python examples/timm_and_hf.py [RUN_FOLDER_OR_CHECKPOINT]. Without a checkpoint a
tiny model is pre-trained first. Needs transformers (pip install transformers).
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from transformers import ViTMAEForPreTraining

import mae_et


def pretrain_tiny(folder: Path) -> Path:
    """Pre-train a tiny masked autoencoder on embedded images, and return its run folder."""
    config = mae_et.PretrainConfig(
        model=mae_et.ModelConfig(
            "vit_tiny_patch16_224", 32, 8, encoder_embed_dim=32, encoder_depth=2,
            encoder_num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
        ),
        data=mae_et.DataConfig(synthetic_size=32, synthetic_train=64),
        curriculum=mae_et.CurriculumConfig(preset="constant", epochs=8),
        optim=mae_et.OptimConfig(batch_size=16, base_lr=0.01),
        efficiency=mae_et.EfficiencyConfig(num_workers=0),
        output=mae_et.OutputConfig(dir=folder, reconstruct_images=0, tensorboard=False),
    )  # fmt: skip
    return mae_et.pretrain(config)


def timm_tokens(file: Path, like: timm.models.VisionTransformer, images: torch.Tensor):
    """Return the tokens [B 1+N D] that plain timm computes from an exported file."""
    network = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(file), num_classes=0,
        img_size=like.patch_embed.img_size, patch_size=like.patch_embed.patch_size,
        embed_dim=like.embed_dim, depth=len(like.blocks), num_heads=like.blocks[0].attn.num_heads,
    )  # fmt: skip
    return network.eval().forward_features(images)


def hugging_face_tokens(folder: Path, images: torch.Tensor):
    """Return the tokens [B 1+N D] that transformers computes from an exported folder."""
    network = ViTMAEForPreTraining.from_pretrained(folder, mask_ratio=0.0).eval().vit
    patches = network.embeddings.patch_embeddings.num_patches
    in_order = torch.arange(patches, dtype=torch.float32).expand(len(images), patches)
    return network(images, noise=in_order).last_hidden_state  # transformers orders patches by noise


@torch.no_grad()
def largest_differences(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Export a checkpoint, and return the largest difference of features, by route."""
    encoder = mae_et.load_encoder(checkpoint)
    images = torch.randn(4, 3, *encoder.patch_embed.img_size)
    tokens = encoder.forward_features(images)
    file = mae_et.export(checkpoint, "timm", folder / "encoder.safetensors")
    hf = mae_et.export(checkpoint, "hf", folder / "hf")
    others = {
        "timm": timm_tokens(file, encoder, images),
        "transformers": hugging_face_tokens(hf, images),
        "timm and back": mae_et.load_encoder(file).forward_features(images),
        "transformers and back": mae_et.load_encoder(hf).forward_features(images),
    }
    return {name: (other - tokens).abs().max().item() for name, other in others.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        start = Path(sys.argv[1]) if sys.argv[1:] else pretrain_tiny(place / "run")
        for route, difference in largest_differences(start, place).items():
            print(f"{route}: features differ by at most {difference:.1e}")
