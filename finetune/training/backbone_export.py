"""Write a classifier on a timm backbone as a folder that timm opens without further settings."""

from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from timm.models import save_for_hf

from finetune.config import ClassifierConfig
from finetune.image_size import height_and_width
from finetune.training.model import load_run_network
from mae_et.checkpoints.preprocessing import CROP_MODE, INTERPOLATION
from mae_et.checkpoints.run_config import read_classifier_description
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable, write_atomically

PUBLISHED = ("tag", "license", "origin_url")
"""What timm's entry of an architecture says of its published weights."""


def export_backbone(run: Path, config: ClassifierConfig, folder: Path) -> Path:
    """Write a run's last weights, its network's arguments, classes and preprocessing.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the logits of the run's network,
    also where windows follow the image size (Swin).

    Args:
        run: folder of a finished run.
        config: its config, with a `model.backbone`.
        folder: folder to write; files of the same names are replaced.

    Returns:
        The folder.

    Raises:
        UserError: the run is damaged, or the folder is one of a run or cannot be written to.
    """
    if (folder / "plan.json").is_file():
        raise UserError(f"output {folder} would add files to a run: give another output")
    network: Any = load_run_network(config.model, run, read_weight_file(run / "model.safetensors"))
    preprocessing = {
        "input_size": (config.model.channels, *height_and_width(config.model.image_size)),
        "mean": config.data.mean, "std": config.data.std, "crop_pct": config.data.eval_crop,
        "interpolation": INTERPOLATION, "crop_mode": CROP_MODE,
    }  # fmt: skip
    about = {
        "label_names": read_classifier_description(run)["classes"],
        "pretrained_cfg": dict.fromkeys(PUBLISHED, ""),
    }
    with TemporaryDirectory() as written, refuse_unwritable(f"output {folder}"):
        save_for_hf(
            network, written, model_config=about, data_config=preprocessing, safe_serialization=True
        )
        for file in sorted(Path(written).iterdir(), reverse=True):  # the weights first
            write_atomically(folder / file.name, partial(copyfile, file))
    return folder
