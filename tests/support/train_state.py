"""A training state after one step."""

import torch

from mae_et.config.schema import OptimConfig
from mae_et.models.mae import MaskedAutoencoder
from mae_et.training.optim import build_optimizer
from mae_et.training.state import TrainState


def state(step: int = 0) -> TrainState:
    torch.manual_seed(step)
    model = MaskedAutoencoder(
        "vit_tiny_patch16_224",
        32,
        8,
        3,
        32,
        1,
        2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    optimizer.step()
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), step, 1.5)
