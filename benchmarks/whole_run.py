"""Time complete runs: curriculum against constant bandwidth, and the cost of writing files.

    mae-et bench run --root FOLDER [--epochs N --rounds N --recipe FILE --flags '[--key=value]']

Arms, timed from the first image read to the last checkpoint, and interleaved in rounds:

- constant, plain: the reference. float32, `fourier`, no curriculum.
- etpp, as many images: the curriculum with the flags given (bf16, a fast loader, ...).
- constant, as much compute and etpp, as much compute: both with the flags given.
- etpp, nothing written: like the previous arm, without metrics, images and all but the last
  checkpoint.
"""

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mae_et.config.files import load_config
from mae_et.config.schema import CropConfig, PretrainConfig
from mae_et.data.datasets import open_dataset
from mae_et.errors import require_in
from mae_et.pretraining import pretrain
from mae_et.training.plan import make_plan

from .rounds import interleave

SILENT = [
    "--output.log_every=100%", "--output.checkpoint_every=100%", "--output.reconstruct_images=0",
    "--output.tensorboard=false",
]  # fmt: skip


@dataclass(frozen=True)
class WholeRunConfig:
    """Compare complete pre-training runs: curriculum, loader, written files."""

    root: Path
    """Folder with train/ and val/."""
    recipe: str = str(Path(__file__).parent / "imagenette128.yaml")
    """Config of every arm."""
    flags: tuple[str, ...] = ("--efficiency.precision=bf16",)
    """Further flags of all arms except the plain one."""
    epochs: float = 1
    """Epochs of the constant arms."""
    rounds: int = 3
    """Number of rounds."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "epochs", "rounds")


def bench_run(config: WholeRunConfig) -> dict[str, Any]:
    """Measure complete runs: curriculum, loader, written files."""
    plain = _config(config, [])
    ours = _config(config, list(config.flags))
    images = len(open_dataset(ours.data, "train", ours.model.channels))
    equal_compute = make_plan(_with(ours, "etpp", config.epochs), images)
    fewer = config.epochs * config.epochs * images / equal_compute.images
    silent = _config(config, [*config.flags, *SILENT])
    runs = {
        "constant, plain": _with(_plain(plain), "constant", config.epochs),
        "etpp, as many images": _with(ours, "etpp", fewer),
        "constant, as much compute": _with(ours, "constant", config.epochs),
        "etpp, as much compute": _with(ours, "etpp", config.epochs),
        "etpp, nothing written": _with(silent, "etpp", config.epochs),
    }
    arms = {name: partial(_run, each) for name, each in runs.items()}
    speeds = interleave(arms, config.rounds, warm_up=0)
    times = {name: speed.seconds for name, speed in speeds.items()}
    figures: dict[str, Any] = {
        "seconds": times,
        "speed_up_at_equal_images": _ratio(times, "constant, plain", "etpp, as many images"),
        "time_at_equal_compute": _ratio(
            times, "etpp, as much compute", "constant, as much compute"
        ),
        "time_with_writing": _ratio(times, "etpp, as much compute", "etpp, nothing written"),
    }
    print("| run | seconds, median (least to most) |\n|---|---|")
    for name, each in times.items():
        print(f"| {name} | {statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f}) |")
    for name in ("speed_up_at_equal_images", "time_at_equal_compute", "time_with_writing"):
        middle, low, high = figures[name]
        print(f"\n{name.replace('_', ' ')}: {middle:.3f} ({low:.3f} to {high:.3f})")
    return figures


def _ratio(times: dict[str, tuple[float, ...]], a: str, b: str) -> tuple[float, float, float]:
    """Return the median, minimum and maximum over rounds of the ratio of two arms' times."""
    ratios = [x / y for x, y in zip(times[a], times[b], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _config(config: WholeRunConfig, flags: list[str]) -> PretrainConfig:
    return load_config(PretrainConfig, [config.recipe], [f"--data.root={config.root}", *flags])


def _with(config: PretrainConfig, preset: Any, epochs: float) -> PretrainConfig:
    curriculum = dataclasses.replace(config.curriculum, preset=preset, epochs=epochs)
    return dataclasses.replace(config, curriculum=curriculum)


def _plain(config: PretrainConfig) -> PretrainConfig:
    efficiency = dataclasses.replace(config.efficiency, precision="fp32")
    return dataclasses.replace(config, efficiency=efficiency, crop=CropConfig("fourier"))


def _run(config: PretrainConfig) -> None:
    """Pre-train in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        output = dataclasses.replace(config.output, dir=Path(folder) / "run")
        pretrain(dataclasses.replace(config, output=output))
