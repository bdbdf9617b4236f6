"""Read the run and preprocessing that a checkpoint records, without building a model.

Run folders are read before PyTorch is loaded, which takes seconds.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mae_et.checkpoints.layouts.hugging_face_config import folder_of, read_preprocessor
from mae_et.checkpoints.layouts.timm_config import timm_architecture, timm_preprocessing
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.run_config import config_of_run, read_classifier_description
from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig

if TYPE_CHECKING:
    from mae_et.checkpoints.weights import Weights


def stored_config(path: Path, key: str | None = None) -> PretrainConfig | None:
    """Return the config of a run folder or of one of our checkpoints; None for other checkpoints.

    A file is read in full, and kept for the next `load_weights`.
    """
    if not path.exists() or (path / "classes.json").is_file() or (path / "config.json").is_file():
        return None  # a model of timm's hub, a classifier's run, or a Hugging Face folder
    if timm_architecture(path) is not None:
        return None
    return config_of_run(path) or _peek(path, key).config


def stored_preprocessing(
    path: Path, key: str | None = None, architecture: str | None = None
) -> Preprocessing | None:
    """Return the preprocessing that a checkpoint, or a timm model by name, records; None if none.

    `key` chooses among several sets of weights. That of a file of weights with the name of its
    `architecture` is in timm's `config.json` beside the file, or published by timm.
    """
    architecture = architecture or timm_architecture(path)
    if architecture is not None or not path.exists():
        beside = timm_preprocessing(path) or read_preprocessor(folder_of(path))
        return beside or Preprocessing.of_timm_model(architecture or str(path))
    if (path / "config.json").is_file():
        return read_preprocessor(path)
    if (path / "classes.json").is_file():
        recorded = read_classifier_description(path).get("preprocessing")
        return Preprocessing.from_dict(recorded, path) if recorded else None
    config = config_of_run(path)
    if config is not None:
        return Preprocessing.of_run(config.data, config.model.image_size)
    return _peek(path, key).preprocessing


def stored_channels(path: Path, key: str | None) -> int | None:
    """Return the image channels of a checkpoint's encoder; None for a model name on a hub."""
    if not path.exists():
        return None
    config = config_of_run(path)
    if config is not None:
        return config.model.channels
    return int(_peek(path, key).encoder["patch_embed.proj.weight"].shape[1])


def stored_data(
    path: Path, key: str | None = None, architecture: str | None = None
) -> DataConfig | None:
    """Return the data of a checkpoint's run, or default data with the statistics it records.

    None for checkpoints that record neither; see `stored_preprocessing` for the arguments.
    """
    config = None if architecture is not None else stored_config(path, key)
    if config is not None:
        return config.data
    preprocessing = stored_preprocessing(path, key, architecture)
    return None if preprocessing is None else DataConfig(**preprocessing.data_settings())


def _peek(path: Path, key: str | None) -> "Weights":
    from mae_et.checkpoints.formats import peek_weights

    return peek_weights(path, key)
