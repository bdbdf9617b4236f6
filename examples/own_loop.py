"""Pre-train a masked autoencoder under EfficientTrain++'s curriculum in a plain PyTorch loop.

Seconds on a CPU, on embedded images: python examples/own_loop.py. The losses are those of
`mae-et pretrain` with the same model, data, budget, seed and `curriculum.cost: area`
(tests/examples/test_own_loop.py); `mae-et pretrain` counts FLOPs by default.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

import mae_et
from mae_et.data.sources.synthetic import Synthetic

BASE, PATCH = 64, 8
OPTIM = mae_et.OptimConfig(batch_size=64, base_lr=4e-3)


class AugmentedImages(Dataset[mae_et.Batch]):
    """Dataset of images, indexed by the sampler's (image, epoch, stage)."""

    def __init__(self, images: Synthetic, plan: mae_et.Plan, seed: int):
        self.images = images
        self.transform = mae_et.train_transform(plan, PATCH, seed, mae_et.DataConfig())

    def __getitem__(self, index: mae_et.SampleIndex) -> mae_et.Batch:
        image, _ = self.images[index.sample]
        return self.transform(image, index)


def train(epochs: float = 4, seed: int = 0, device: str = "cpu") -> Iterator[tuple[int, float]]:
    """Train, and yield the bandwidth and the loss of each step."""
    images = Synthetic(512, BASE)
    data = mae_et.DataConfig()  # default statistics and crop scale
    curriculum = mae_et.Curriculum.preset("etpp", BASE, PATCH)
    plan = curriculum.plan(epochs, dataset_size=len(images), batch_size=OPTIM.batch_size)
    loader = DataLoader(
        AugmentedImages(images, plan, seed),
        # Several GPUs: rank=..., world_size=...; to resume: start_step=...
        batch_sampler=mae_et.CurriculumBatchSampler(plan, seed),
    )
    torch.manual_seed(seed)
    model = mae_et.MaskedAutoencoder(
        "vit_tiny_patch16_224", BASE, PATCH, encoder_embed_dim=64, encoder_depth=2,
        encoder_num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
    ).to(device)  # fmt: skip
    optimizer = mae_et.build_optimizer(model, OPTIM)  # AdamW; any other works as well
    for step, batch in enumerate(loader):
        mae_et.set_schedule(optimizer, plan.progress(step), OPTIM)
        bandwidth = plan.stages[int(batch.stage[0])].bandwidth
        pixels = mae_et.low_frequency_crop(batch.images.to(device), bandwidth)
        pixels = mae_et.normalise(pixels, data.mean, data.std)  # [B C bandwidth bandwidth]
        mask = mae_et.mask_from_noise(batch.noise.to(device), model.mask_ratio)
        loss = model(pixels, mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield bandwidth, loss.item()


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for step, (bandwidth, loss) in enumerate(train(device=device), start=1):
        print(f"step {step}: bandwidth {bandwidth}, loss {loss:.4f}")
