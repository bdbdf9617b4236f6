"""Preprocessing of the weights that a classifier starts from."""

from finetune.config import NetworkConfig
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
    """Return the preprocessing of a classifier's run, in our own files, or beside others."""
    path = source.path
    if source.kind == "classifier":
        return source.preprocessing()
    from mae_et.checkpoints.weight_files import PREPROCESSING_KEY, read_weight_file

    text = read_weight_file(path).get(PREPROCESSING_KEY) if path.is_file() else None
    return source.preprocessing_beside() if text is None else Preprocessing.from_json(text, path)
