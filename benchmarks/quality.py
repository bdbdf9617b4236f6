"""Compare the accuracy of curricula, targets, positions and decoders at equal compute or time.

    mae-et bench quality --root FOLDER --arms '[plain,plain-4x,etpp-hog]' --seeds '[0,1,2]'

Every arm pre-trains the same small model on the same data, and is scored on the validation split by
kNN, a linear probe and fine-tuning, with one recipe for all. Finished arms are skipped and
interrupted ones resume, so arms and seeds can be added at any time, and several processes can share
a folder if they have different arms or seeds.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import ProbeConfig, score_encoder
from mae_et.checkpoints.source import recognise
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import open_dataset
from mae_et.errors import UserError
from mae_et.pretraining import pretrain
from mae_et.runtime.distributed import choose_device
from mae_et.training.plan import curriculum_of, make_plan

from .arms import ARMS
from .fine_tuning import fine_tuned, kept, untrained
from .quality_table import SCORES, Rows, draw, equal_accuracy, table
from .rounds import interleave
from .training_step import training_step


@dataclass(frozen=True)
class QualityConfig:
    """Compare pre-training runs by the accuracy of their encoders."""

    root: Path
    """Folder with train/ and val/."""
    arms: tuple[str, ...] = ("plain", "plain-2x", "plain-4x", "etpp", "etpp-hog")
    """Names of arms in benchmarks/arms.py."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every arm."""
    epochs: float = 8
    """Compute of an arm of budget 1, in equivalent epochs."""
    fine_tune_epochs: float = 3
    """Epochs of fine-tuning; 0 skips it."""
    recipe: str = str(Path(__file__).parent / "imagenette128.yaml")
    """Config of every arm."""
    flags: tuple[str, ...] = ()
    """Further flags of every arm."""
    folder: Path = Path("runs/quality")
    """Folder of the runs."""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or not self.seeds:
            raise UserError(f"arms must be some of {', '.join(ARMS)}, and seeds be given")


def bench_quality(config: QualityConfig) -> dict[str, Any]:
    """Compare curricula, targets and decoders by kNN, linear and fine-tuned accuracy."""
    rows: Rows = {}
    for name in config.arms:
        for seed in config.seeds:
            rows.setdefault(name, []).append(run_arm(config, name, seed))
            print(f"{name}, seed {seed}: {rows[name][-1]}", flush=True)
    print(table(rows), equal_accuracy(rows), sep="\n\n")
    draw(config.folder / "quality.png", rows)
    return rows


def run_arm(config: QualityConfig, name: str, seed: int) -> dict[str, Any]:
    """Pre-train and score an arm, or read its results."""
    folder = config.folder / f"{name}-seed{seed}"
    pretraining = arm_config(config, name, seed, folder)
    encoder = folder / "encoder.safetensors"
    if ARMS[name].budget:
        pretrain(pretraining)
        results = json.loads((folder / "results.json").read_text())
    else:
        untrained(pretraining, encoder)
        results = dict.fromkeys(("images", "equivalent_epochs", "compute", "training_seconds"), 0)
    data, efficiency = pretraining.data, pretraining.efficiency

    def features() -> dict[str, Any]:
        probe = ProbeConfig(
            encoder,
            data=data,
            num_workers=efficiency.num_workers,
            precision=efficiency.precision,
            seed=seed,
        )
        return score_encoder(probe)

    def whole() -> dict[str, Any]:
        flags = [
            f"--data.root={config.root}", f"--model.image_size={pretraining.model.image_size}",
            f"--efficiency.precision={efficiency.precision}", f"--seed={seed}",
            f"--efficiency.num_workers={efficiency.num_workers}",
            f"--optim.batch_size={pretraining.optim.batch_size}",
            "--output.evaluate_every=100%",
        ]  # fmt: skip
        return {
            "fine_tuned": fine_tuned(
                encoder, folder / "fine-tuned", config.fine_tune_epochs, flags, "fine-tuned"
            )
        }

    scores = kept(folder / "scores.json", features)
    if config.fine_tune_epochs:
        scores |= kept(folder / f"fine_tuned_{config.fine_tune_epochs:g}.json", whole)
    return {
        "images": results["images"],
        "equivalent_epochs": results["equivalent_epochs"],
        "compute": results["compute"],
        "seconds": results["training_seconds"],
    } | {name: scores[name] for name in SCORES if name in scores}


def arm_config(config: QualityConfig, name: str, seed: int, folder: Path) -> PretrainConfig:
    """Return the config of an arm's pre-training, as stored once it has started."""
    arm = ARMS[name]
    begun = recognise(folder).config() if (folder / "config.yaml").exists() else None
    mine = _load(config, arm.flags, seed, folder)
    epochs = config.epochs * (arm.budget or 1)  # untrained arms have the config of plain MAE
    if begun is not None:
        epochs = begun.curriculum.epochs
    elif arm.images_of is not None:
        other = _load(config, ARMS[arm.images_of].flags, seed, folder)
        images = len(open_dataset(mine.data, "train", mine.model.channels))
        per_epoch = [
            make_plan(_budget(each, epochs), images).images / epochs for each in (other, mine)
        ]
        epochs *= per_epoch[0] / per_epoch[1]
    elif arm.time_of is not None:
        other = _load(config, ARMS[arm.time_of].flags, seed, folder)
        epochs *= times_faster(mine, other)
    mine = _budget(mine, epochs)
    if arm.replay:
        bandwidths = sorted({stage.bandwidth for stage in curriculum_of(mine).stages})
        replay = dict(zip(bandwidths[:-1], arm.replay, strict=False))
        mine = dataclasses.replace(mine, data=dataclasses.replace(mine.data, replay=replay))
    return mine


def times_faster(mine: PretrainConfig, other: PretrainConfig) -> float:
    """Return how many times faster a step of one config is than another's, at the base size."""
    steps: dict[str, Callable[[], object]] = {
        name: training_step(
            each.model, min(each.optim.batch_size, 32), each.model.image_size, "fp32",
            choose_device(each.efficiency.device),
        )
        for name, each in (("other", other), ("mine", mine))
    }  # fmt: skip
    return statistics.median(interleave(steps, 9)["mine"].ratios)


def _load(config: QualityConfig, flags: tuple[str, ...], seed: int, folder: Path) -> PretrainConfig:
    own = [f"--data.root={config.root}", f"--seed={seed}", f"--output.dir={folder}"]
    return load_config(PretrainConfig, [config.recipe], [*own, *flags, *config.flags])


def _budget(config: PretrainConfig, epochs: float) -> PretrainConfig:
    curriculum = dataclasses.replace(config.curriculum, epochs=epochs)
    return dataclasses.replace(config, curriculum=curriculum)
