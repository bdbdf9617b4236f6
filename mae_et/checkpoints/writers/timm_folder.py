"""Write a network as a folder that timm opens without further settings."""

from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from timm.models import save_for_hf

from mae_et.checkpoints.preprocessing import CROP_MODE, INTERPOLATION, Preprocessing
from mae_et.checkpoints.state_dicts import Tensors
from mae_et.checkpoints.writers.tensor_files import write_safetensors
from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable, write_atomically

PUBLISHED = ("tag", "license", "origin_url")
"""What timm's entry of an architecture says of its published weights."""


def write_timm_folder(
    folder: Path,
    network: Any,
    tensors: Tensors,
    input_size: tuple[int, int, int],
    preprocessing: Preprocessing,
    classes: list[str] | None = None,
    entries: dict[str, str] | None = None,
) -> None:
    """Write `model.safetensors`, and `config.json` with the network's arguments.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it.

    Args:
        folder: folder to write; files of these names are replaced.
        network: a network that timm created, which knows its arguments.
        tensors: its weights.
        input_size: channels, height and width of its images.
        preprocessing: of its images.
        classes: names of its outputs.
        entries: what else the file of weights records.

    Raises:
        UserError: the folder is one of a run, or cannot be written to.
    """
    if (folder / "plan.json").is_file():
        raise UserError(f"output {folder} would add files to a run: give another output")
    data = {
        "input_size": input_size, "mean": preprocessing.mean, "std": preprocessing.std,
        "crop_pct": preprocessing.eval_crop, "interpolation": INTERPOLATION, "crop_mode": CROP_MODE,
    }  # fmt: skip
    about = {"label_names": classes, "pretrained_cfg": dict.fromkeys(PUBLISHED, "")}
    with TemporaryDirectory() as written, refuse_unwritable(f"output {folder}"):
        save_for_hf(network, written, model_config=about, data_config=data, safe_serialization=True)
        write_safetensors(tensors, folder / "model.safetensors", entries)
        write_atomically(folder / "config.json", partial(copyfile, Path(written, "config.json")))
