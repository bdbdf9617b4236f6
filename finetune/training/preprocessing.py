"""Preprocessing of the weights that a classifier starts from."""

from pathlib import Path

from finetune.config import NetworkConfig
from mae_et.checkpoints.layouts.timm_config import timm_preprocessing
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.stored_settings import stored_preprocessing


def preprocessing_of_start(config: NetworkConfig) -> Preprocessing | None:
    """Return the preprocessing recorded for the initial weights; None if there is none."""
    if config.backbone is None:
        assert config.checkpoint is not None  # NetworkConfig requires one of the two
        return stored_preprocessing(config.checkpoint, config.checkpoint_key)
    recorded = None if config.checkpoint is None else _recorded_with(config.checkpoint)
    return recorded or (Preprocessing.of_timm_model(config.backbone) if config.pretrained else None)


def _recorded_with(checkpoint: Path) -> Preprocessing | None:
    """Return the preprocessing in a classifier's run folder, or in our own or timm's files."""
    if (checkpoint / "classes.json").is_file():
        return stored_preprocessing(checkpoint)
    from mae_et.checkpoints.weight_files import PREPROCESSING_KEY, read_weight_file

    text = read_weight_file(checkpoint).get(PREPROCESSING_KEY) if checkpoint.is_file() else None
    if text is None:
        return timm_preprocessing(checkpoint)
    return Preprocessing.from_json(text, checkpoint)
