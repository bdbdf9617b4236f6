"""Keys that a config inherits from its checkpoint or initial weights, unless given."""

from pathlib import Path
from typing import Any

from finetune.config import ClassifierConfig, ClassifierOutputConfig
from finetune.run_folder import default_output, is_unsaved
from finetune.scoring_config import FrozenNetworkConfig
from mae_et.checkpoints.run_config import config_of_run, recorded_config
from mae_et.config.data import SOURCE_KEYS, STATISTICS, DataConfig
from mae_et.config.files import plain
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.data.datasets import ROOTED
from mae_et.errors import UserError
from mae_et.io.plain_files import read_text
from mae_et.runtime.console import is_main, say
from mae_et.training.plan import curriculum_of


def inherited_keys(command: str, config: object) -> dict[str, Any]:
    """Return the keys that a command's config inherits from its initial weights."""
    if isinstance(config, RunConfig) and config.continues is not None:
        return {}  # the continued run's config has them
    if isinstance(config, ClassifierConfig):
        return _by_classifier(command, config)
    if isinstance(config, PretrainConfig) and command not in {"plan", "bench node"}:
        return _by_pretraining(config)
    return {}


def data_of_checkpoint(config: FrozenNetworkConfig) -> DataConfig | None:
    """Return the data, or at least the statistics, that a checkpoint was trained with."""
    from finetune import read_classifier_config
    from mae_et.checkpoints.source import recognise

    path, named = config.checkpoint, config.architecture
    run = read_classifier_config(path)
    if run is not None:
        return run.data
    data = recognise(path, config.checkpoint_key, named).data()
    if named is not None and data is not None and is_main():
        say(
            f"images as timm records for {named}, unless given: data.mean "
            f"{list(data.mean)}, data.std {list(data.std)}, data.eval_crop {data.eval_crop}"
        )
    return data


def _by_pretraining(config: PretrainConfig) -> dict[str, Any]:
    """Return the image statistics and the position grid of `init.weights`."""
    start = config.init.weights
    if start is None:
        return {}
    before = _earlier_run(config.output.dir)
    if before is not None and before.init == config.init:  # resumes; the weights may be gone
        data = plain(before.data)
        keys = {f"data.{key}": data[key] for key in STATISTICS}
        return keys | {"model.position_grid": before.model.position_grid}
    if _is_missing_file(start):
        return {}
    curriculum_of(config)  # refused before the weights are read
    from mae_et.checkpoints.initial_weights import inherited_settings

    return inherited_settings(start, config.model, config.init.checkpoint_key)


def _by_classifier(command: str, config: ClassifierConfig) -> dict[str, Any]:
    """Return image statistics and sizes and, of fine-tuning, the data and the run folder."""
    start, backbone = config.model.checkpoint, config.model.backbone
    keys: dict[str, Any] = {}
    folder = config.output.dir
    if start is not None and command == "finetune":
        inherited = default_output(start, config.model.probe)
        keys["output.dir"] = str(inherited)
        folder = inherited if folder == ClassifierOutputConfig.dir else folder
    before = folder / "config.yaml"
    hub = start is None and ":" in (backbone or "")  # which may be unreachable
    if (hub or (start is not None and not start.exists())) and before.is_file():
        return keys | _inherited_before(before)
    if start is None and not config.model.pretrained:
        return keys
    if start is not None and (_is_missing_file(start) or is_unsaved(start)):
        return keys
    from finetune.training.preprocessing import preprocessing_of_start
    from mae_et.checkpoints.source import recognise

    name = config.data.name  # recipes set folder, which without a root is no dataset
    given = config.data.root or name not in {None, *ROOTED} or backbone
    source = None if start is None else recognise(start, config.model.checkpoint_key)
    run = None if given or source is None or command != "finetune" else source.config()
    if run is not None and name in {None, run.data.source}:
        data = plain(run.data) | {"name": run.data.source}
        keys |= {f"data.{key}": data[key] for key in SOURCE_KEYS}
    channels = None if source is None or backbone else source.channels()
    if channels is not None:
        keys["model.channels"] = channels
    preprocessing = preprocessing_of_start(config.model)
    if preprocessing is not None:
        keys |= {f"data.{key}": value for key, value in preprocessing.data_settings().items()}
        if preprocessing.image_size is not None:
            keys["model.image_size"] = preprocessing.image_size
    return keys


def _inherited_before(path: Path) -> dict[str, Any]:
    """Return the same keys from a run to resume whose initial weights are gone."""
    before = recorded_config(read_text(path), ClassifierConfig, path)
    data = plain(before.data)
    keys = {f"data.{key}": data[key] for key in (*SOURCE_KEYS, "eval_crop")}
    return keys | {
        "model.image_size": before.model.image_size,
        "model.channels": before.model.channels,
    }


def _earlier_run(folder: Path) -> PretrainConfig | None:
    """Return the config of the pre-training run in a folder; None without one."""
    try:
        return config_of_run(folder)
    except UserError:  # of another command; `check_same_run` reports it
        return None


def _is_missing_file(start: Path) -> bool:
    """Return whether a checkpoint is a file that does not exist, not a model's name on a hub."""
    return len(start.parts) > 1 and ":" not in str(start) and not start.exists()
