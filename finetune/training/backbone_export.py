"""Write a classifier on a timm backbone as a folder that timm opens without further settings."""

from pathlib import Path
from typing import Any

from finetune.config import ClassifierConfig
from finetune.image_size import height_and_width
from finetune.training.model import load_run_network
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.run_config import read_classifier_description
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.checkpoints.writers.timm_folder import write_timm_folder


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
    network: Any = load_run_network(config.model, run, read_weight_file(run / "model.safetensors"))
    size, classes = config.model.image_size, read_classifier_description(run)["classes"]
    write_timm_folder(
        folder, network, network.state_dict(), (config.model.channels, *height_and_width(size)),
        Preprocessing.of_run(config.data, size), classes,
    )  # fmt: skip
    return folder
