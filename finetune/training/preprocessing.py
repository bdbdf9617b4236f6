"""Preprocessing of the weights that a classifier starts from."""

from finetune.config import NetworkConfig
from mae_et.checkpoints.layouts.timm_config import timm_preprocessing
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.source import Source, recognise


def preprocessing_of_start(config: NetworkConfig) -> Preprocessing | None:
    """Return the preprocessing recorded for the initial weights; None if there is none."""
    recorded = None
    if config.checkpoint is not None:
        source = recognise(config.checkpoint, config.checkpoint_key)
        recorded = _recorded_for_backbone(source) if config.backbone else source.preprocessing()
    published = config.backbone if config.pretrained else None
    return recorded or (Preprocessing.of_timm_model(published) if published else None)


def _recorded_for_backbone(source: Source) -> Preprocessing | None:
    """Return the preprocessing in a classifier's run folder, or in our own or timm's files."""
    path = source.path
    if source.kind == "classifier":
        return source.preprocessing()
    from mae_et.checkpoints.weight_files import PREPROCESSING_KEY, read_weight_file

    text = read_weight_file(path).get(PREPROCESSING_KEY) if path.is_file() else None
    return timm_preprocessing(path) if text is None else Preprocessing.from_json(text, path)
