"""The section `init` of a configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_et.config.keys import key
from mae_et.errors import require


@dataclass(frozen=True)
class InitConfig:
    """What pre-training starts from; random weights by default."""

    weights: Path | None = key(None, "rank", "common")
    """Checkpoint to start from: run folder, file (.pth, .pt, .safetensors), Hugging Face folder, or
    timm's name of a model. It must have the encoder of the config. Positions are laid over its grid
    (model.position_grid), and its patch embedding is resampled to another patch size."""
    decoder: Literal["auto", "fresh"] = "auto"
    """auto: take the decoder of init.weights if there is one that fits; fresh: initialise it."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in a file, such as teacher."""
    extends: Path | None = key(None, "origin", "rank")
    """Run folder whose last checkpoint before optim.decay_fraction is continued, at the run's last
    bandwidth, to the larger budget curriculum.epochs; mae-et pretrain RUN --extend-to EPOCHS sets
    it."""

    def __post_init__(self) -> None:
        require(
            self.weights is not None or (self.decoder == "auto" and self.checkpoint_key is None),
            "init.decoder and init.checkpoint_key need init.weights",
        )
