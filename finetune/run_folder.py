"""Read the run folder of a classifier, and refuse unsuitable folders for scores."""

from dataclasses import replace
from pathlib import Path

from finetune.config import ClassifierConfig, Probe
from finetune.image_size import format_size
from finetune.scoring_config import ClassifierUseConfig, FrozenNetworkConfig
from mae_et.checkpoints.listing import list_checkpoints
from mae_et.checkpoints.run_config import read_only_data, recorded_config
from mae_et.config.data import DataConfig
from mae_et.config.model_names import is_model
from mae_et.errors import UserError, require
from mae_et.io.lock import check_writable
from mae_et.io.plain_files import read_text

WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz")


def read_classifier_config(path: str | Path) -> ClassifierConfig | None:
    """Return the config of a classifier's run folder; None for other paths.

    Raises:
        UserError: the run is not finished, or its config is damaged.
    """
    path = Path(path)
    written = path / "config.yaml"
    if not (path / "classes.json").is_file() or not written.is_file():
        return None
    if not (path / "model.safetensors").is_file():
        raise UserError(f"{path} is the folder of a classifier's run that is not finished")
    config = recorded_config(read_text(written), ClassifierConfig, written)
    return replace(config, data=read_only_data(config.data))


def default_output(start: Path, probe: Probe) -> Path:
    """Return the run folder of a fine-tuning that names none: one of its own for each checkpoint.

    In a run folder, also of a job that waits, it is a subfolder.
    """
    kind = "finetune" if probe == "none" else f"finetune-{probe}"
    if (start / "config.yaml").is_file() or (start / "slurm").is_dir():
        return start / kind
    name = start.stem if start.suffix in WEIGHT_FILES else start.name
    return Path("runs") / f"{kind}-{name}"


def is_unsaved(start: Path) -> bool:
    """Return whether a checkpoint is the folder of a job that has not saved anything yet."""
    saved = list_checkpoints(start / "checkpoints") or any(start.glob("*.safetensors"))
    return (start / "slurm").is_dir() and not saved


def no_data(origin: object) -> UserError:
    """Return the error for images that neither the user nor a checkpoint or model names."""
    return UserError(
        f"data must be given (--data.root or --data.name): {origin} does not record its training "
        "data"
    )


def check_scored_data(config: FrozenNetworkConfig) -> None:
    """Refuse to score a model of timm's hub without data, before it is fetched."""
    name = config.checkpoint
    if config.data is None and not name.exists() and is_model(str(name)):
        raise no_data(name)


def check_training_data(config: ClassifierConfig, may_wait: bool = False) -> None:
    """Refuse to fine-tune without data, which also a checkpoint may name.

    `may_wait`: another job may write a missing checkpoint.
    """
    if config.data.name or config.data.root:
        return
    start = config.model.checkpoint
    exists = start is None or is_model(str(start)) or (start.exists() and not is_unsaved(start))
    if exists:
        raise no_data(start or config.model.backbone)
    require(may_wait, f"there is no checkpoint {start}")


def data_to_evaluate(config: ClassifierUseConfig, run: ClassifierConfig | None) -> DataConfig:
    """Return the data that a checkpoint is scored on: the given ones, or those of its run.

    Raises:
        UserError: it is a run of pre-training, no data are known, or a key has no effect on the
            score of this checkpoint.
    """
    if run is None:
        require(
            not (config.checkpoint / "config.yaml").is_file(),
            f"{config.checkpoint} is a run of mae-et pretrain, which has no classifier: fine-tune "
            "it with mae-et finetune, or score its encoder with mae-et knn or mae-et linear-probe",
        )
        require(
            config.weights == "last",
            f"weights best needs a classifier's run folder, not {config.checkpoint}",
        )
        if config.data is None:
            raise no_data(config.checkpoint)
        return config.data
    for key in ("architecture", "checkpoint_key", "encoder_num_heads"):
        require(
            getattr(config, key) is None,
            f"{key} is for other checkpoints: {config.checkpoint} is a run, which records its own",
        )
    if config.image_size not in {None, run.model.image_size}:
        raise UserError(
            f"image_size: {config.checkpoint} is a run, which is scored at its own size, "
            f"{format_size(run.model.image_size)} pixels: export it to score it at another"
        )
    return config.data or run.data


def check_scores_folder(folder: Path) -> None:
    """Refuse to write scores to a folder that is not writable, or is a run's with own results."""
    if (folder / "plan.json").is_file():
        raise UserError(
            f"output {folder} is the folder of a run, whose results.json would be replaced: give "
            f"another, such as {folder / 'scores'}"
        )
    check_writable(folder)
