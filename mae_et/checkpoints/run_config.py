"""What the folder of a run says of it, which may be anybody's: checked, and never written to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from mae_et.config.files import config_from_text
from mae_et.config.schema import DataConfig, PretrainConfig
from mae_et.errors import UserError
from mae_et.io.plain_files import read_mapping, read_text

# Of the encoder in files that say of no other; its sizes are read from the tensors.
DEFAULT_ENCODER = "vit_base_patch16_224"


def config_from_checkpoint(text: str) -> PretrainConfig:
    """Return the config that a run wrote down; of its data nothing is written.

    Raises:
        UserError: it is no such config.
    """
    config = config_from_text(text, PretrainConfig)
    return replace(config, data=read_only_data(config.data))


def config_of_run(folder: Path) -> PretrainConfig | None:
    """Return the config of a pre-training's run folder; None where it has none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "config.yaml"
    if (folder / "classes.json").is_file() or not path.is_file():
        return None  # a classifier's run has another config
    text = read_text(path)
    try:
        return config_from_checkpoint(text)
    except UserError as error:
        raise UserError(f"{path} is damaged, or of another version of mae-et: {error}") from None


def read_only_data(data: DataConfig) -> DataConfig:
    """Return the data that a file names, so that nothing is written where the file says.

    A checkpoint may be a stranger's. Listings are kept, and a data set is downloaded, only into
    folders that the user names; where a file names none, ours (`data/NAME`) is as good.
    """
    root = data.root
    if root is not None and data.source.startswith("hfds/") and not root.is_dir():
        root = None  # where their cache would be made
    return replace(data, root=root, listing=None, download=data.download and data.root is None)


def read_classifier_description(folder: Path) -> dict[str, Any]:
    """Return what a classifier's run folder says of its classes, encoder, heads and positions.

    Raises:
        UserError: it cannot be read, or says it in other kinds.
    """
    path = folder / "classes.json"
    about = read_mapping(path)
    classes, heads, grid = about.get("classes"), about.get("encoder_num_heads"), about.get("grid")
    encoder = about.get("encoder") or DEFAULT_ENCODER
    if not (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and (heads is None or type(heads) is int)
        and (grid is None or (isinstance(grid, list) and [type(n) for n in grid] == [int, int]))
        and isinstance(encoder, str)
        and timm.is_model(encoder)  # others would be looked for on a hub
    ):
        raise UserError(f"{path} is damaged: it says no classes, encoder, heads or grid")
    return about | {"encoder": encoder, "encoder_num_heads": heads}
