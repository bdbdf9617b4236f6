"""A config that trains in seconds and passes through three stages; the golden values."""

from pathlib import Path

from mae_et import PretrainConfig, load_config

GOLDEN = Path(__file__).parents[1] / "golden"

TINY = """
model: {encoder: vit_tiny_patch16_224, image_size: 32, patch_size: 8, encoder_embed_dim: 32,
        encoder_depth: 2, encoder_num_heads: 2, decoder_embed_dim: 16, decoder_depth: 1,
        decoder_num_heads: 2}
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 20}
curriculum: {preset: custom, epochs: 4.5,
             stages: [{bandwidth: 16, share: 1}, {bandwidth: 24, share: 1},
                      {bandwidth: 32, share: 2}]}
optim: {batch_size: 12, base_lr: 0.02}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 2, checkpoint_every: 5, reconstruct_every: 50%, reconstruct_images: 0}
"""
IMAGES = "--output.reconstruct_images=2"  # which take a third of a run's time


def config_in(folder: Path, *flags: str, recipe: str = TINY) -> PretrainConfig:
    """Write a recipe into a folder, and return its config; the run folder is FOLDER/run."""
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return load_config(PretrainConfig, [path], [f"--output.dir={folder / 'run'}", *flags])
