"""What a path is, by the files that are there, and what they record.

Weights are read only where nothing else records it: PyTorch takes seconds to load.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mae_et.checkpoints.layouts.hugging_face_config import (
    INDEX,
    file_of_folder,
    folder_of,
    read_preprocessor,
)
from mae_et.checkpoints.layouts.timm_config import timm_architecture, timm_preprocessing
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.run_config import config_of_run, read_classifier_description
from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.io.plain_files import read_mapping

if TYPE_CHECKING:
    from mae_et.checkpoints.weights import Weights

Kind = Literal["name", "file", "transformers", "classifier", "run"]


@dataclass(frozen=True)
class Source:
    """A checkpoint, or a timm model's name, as `recognise` found it."""

    path: Path
    """As given."""
    kind: Kind
    """`name` if nothing is there, `file` also for the weights in a folder of timm or accelerate,
    `run` for any folder that is none of the others."""
    place: Path
    """File, index of shards, or folder to read: its folder, for a file that transformers saved."""
    key: str | None
    """Choice among several sets of weights in a file."""
    architecture: str | None
    """timm's name of the network, given or recorded."""

    @property
    def is_named(self) -> bool:
        """Whether timm builds the network by name; otherwise its tensors determine it."""
        return self.architecture is not None or self.kind == "name"

    def config(self) -> PretrainConfig | None:
        """Return the config of a run folder or of one of our checkpoints; None for others."""
        if self.is_named or self.kind in {"transformers", "classifier"}:
            return None
        return config_of_run(self.path) or self._weights().config

    def preprocessing(self) -> Preprocessing | None:
        """Return the recorded preprocessing, or that which timm publishes for a name."""
        if self.is_named:
            name = self.architecture or str(self.path)
            return self.preprocessing_beside() or Preprocessing.of_timm_model(name)
        if self.kind == "transformers":
            return read_preprocessor(self.place)
        if self.kind == "classifier":
            recorded = read_classifier_description(self.path).get("preprocessing")
            return Preprocessing.from_dict(recorded, self.path) if recorded else None
        config = config_of_run(self.path)
        if config is not None:
            return Preprocessing.of_run(config.data, config.model.image_size)
        return self._weights().preprocessing

    def preprocessing_beside(self) -> Preprocessing | None:
        """Return that of timm's or transformers' configs beside the weights, of any network."""
        return timm_preprocessing(self.path) or read_preprocessor(folder_of(self.path))

    def data(self) -> DataConfig | None:
        """Return the data of the run, or default data with the recorded statistics, if any."""
        if (config := self.config()) is not None:
            return config.data
        preprocessing = self.preprocessing()
        return None if preprocessing is None else DataConfig(**preprocessing.data_settings())

    def channels(self) -> int | None:
        """Return the image channels of the encoder; None for a name."""
        if self.kind == "name":
            return None
        config = config_of_run(self.path)
        if config is not None:
            return config.model.channels
        return int(self._weights().encoder["patch_embed.proj.weight"].shape[1])

    def description(self) -> dict[str, Any]:
        """Return the `config.json` of a folder; empty without one."""
        file = self.place / "config.json"
        return read_mapping(file) if file.is_file() else {}

    def _weights(self) -> "Weights":
        """Read the weights in full, and keep them for the next `load_weights`."""
        from mae_et.checkpoints.formats import peek_weights

        return peek_weights(self.path, self.key)


def recognise(path: Path, key: str | None = None, architecture: str | None = None) -> Source:
    """Recognise a path, or a timm model's name.

    Raises:
        UserError: a `config.json` cannot be read, or the file is one of several.
    """
    return Source(path, *_kind_and_place(path), key, architecture or timm_architecture(path))


def _kind_and_place(path: Path) -> tuple[Kind, Path]:
    if not path.exists():
        return "name", path
    place = folder_of(path)
    if place.is_file():
        if not place.name.endswith(INDEX):
            return "file", place
        place = place.parent
    weights = file_of_folder(place)
    if timm_architecture(place) is None:
        if (place / "config.json").is_file():
            return "transformers", place
        if (place / "classes.json").is_file():
            return "classifier", place
        if weights is None:
            return "run", place
    return "file", weights or place
