"""What a search is: the run that it is for, what is tried, and what is the best."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mae_et.config.schema import CurriculumConfig, OutputConfig, PretrainConfig, Stage
from mae_et.curriculum.schedule import scaled_bandwidth
from mae_et.errors import require

# The bandwidths that both papers choose from, at their base size.
PAPER_BANDWIDTHS = (96, 128, 160, 192, 224)


@dataclass(frozen=True)
class SearchOptions:
    """How a curriculum is searched."""

    strategy: Literal["sequential", "greedy", "bayes"] = "sequential"
    """sequential: stage by stage under a fixed compute (EfficientTrain++); greedy: the least
    bandwidths that still reach constant bandwidth, stages of equal epochs (EfficientTrain, ICCV);
    bayes: whole curricula under a fixed compute, by Optuna, bandwidths never falling."""
    stages: int = 10
    """Stages of equal share."""
    candidates: tuple[int, ...] = ()
    """Bandwidths to choose from; by default the papers' 96, 128, 160, 192 and 224, carried to the
    base size and rounded up to the patch."""
    epochs: float | None = None
    """Budget of the trials, as curriculum.epochs counts it; that by default. The curriculum that is
    found is written for curriculum.epochs."""
    finetune: float = 0.05
    """Of sequential: the short training at full bandwidth before a trial is scored, as a share of
    the budget."""
    tolerance: float = 0.0
    """Of greedy: how far below constant bandwidth a score may lie and still count as reaching it,
    in the objective's unit."""
    trials: int = 20
    """Of bayes: curricula to try; more may be asked for later."""
    prune_from: float | None = 0.6
    """Of bayes: share of the compute after which, at each stage's end, a trial that lies below the
    median of those before it is given up (the objective is then given runs that are not finished);
    none is when not given, or on a cluster."""
    magnitude: int = 9
    """RandAugment magnitude of the last stage, to which it rises from 0 (0 to 10). Read where
    data.augment is on; bayes then searches it."""
    objective: str = "knn"
    """What is to be high: knn or linear accuracy on held-out training images, or
    package.module:function, which is given a run folder and returns a number."""
    held_out: float = 0.1
    """Share of the labelled training images that accuracy is measured on. Their labels are seen by
    no neighbour and no probe; the images are pre-trained on as all others."""
    images: int | None = None
    """Training images that the accuracy is computed from, drawn at random; all by default."""
    cluster: str | None = None
    """Cluster, as mae-et submit takes it (file or shipped name): trials that do not wait for each
    other are its jobs. By default they run in this process, one after another."""
    at_once: int = 4
    """Of bayes on a cluster: trials that are proposed at once."""
    keep_checkpoints: bool = False
    """Whether the checkpoints of trials that are out of the race are kept."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for name in ("stages", "trials", "at_once", "images"):
            value = getattr(self, name)
            require(value is None or value > 0, f"search.{name} must be positive, got {value}")
        require(
            self.epochs is None or (self.epochs > 0 and math.isfinite(self.epochs)),
            f"search.epochs must be positive, got {self.epochs}",
        )
        for name in ("finetune", "held_out"):
            value = getattr(self, name)
            require(0 < value < 1, f"search.{name} is a share in (0, 1), got {value}")
        require(
            self.prune_from is None or 0 < self.prune_from < 1,
            f"search.prune_from is a share in (0, 1), got {self.prune_from}",
        )
        require(
            0 <= self.tolerance < math.inf,
            f"search.tolerance must not be negative, got {self.tolerance}",
        )
        require(
            0 <= self.magnitude <= 10, f"search.magnitude lies in [0, 10], got {self.magnitude}"
        )
        require(
            self.strategy != "greedy" or self.stages > 1,
            "search.stages must be at least 2: greedy leaves the last stage at full bandwidth",
        )
        require(
            self.objective in {"knn", "linear"}
            or re.fullmatch(r"[\w.]+:[\w.]+", self.objective) is not None,
            f"search.objective must be knn, linear or package.module:function, "
            f"got {self.objective!r}",
        )


@dataclass(frozen=True)
class SearchConfig(PretrainConfig):
    """Search a curriculum for the run that the other keys describe.

    curriculum.epochs and curriculum.cost are its budget; preset and stages are what is searched.
    """

    output: OutputConfig = field(default_factory=lambda: OutputConfig(dir=Path("runs/search")))
    search: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other.

        Raises:
            UserError: see `PretrainConfig`; or a candidate is no bandwidth of the model.
        """
        super().__post_init__()
        base, patch = self.model.image_size, self.model.patch
        for bandwidth in self.search.candidates:
            require(
                0 < bandwidth <= base and bandwidth % patch == 0,
                f"search.candidates: {bandwidth} is no multiple of the patch size {patch} "
                f"up to the base size {base}",
            )
        require(len(self.candidates) > 1, "search.candidates needs at least two bandwidths")

    @property
    def candidates(self) -> tuple[int, ...]:
        """The bandwidths to choose from, rising."""
        base, patch = self.model.image_size, self.model.patch
        carried = (scaled_bandwidth(bandwidth, base, patch) for bandwidth in PAPER_BANDWIDTHS)
        return tuple(sorted(set(self.search.candidates or carried)))

    @property
    def budget(self) -> float:
        """Compute of a whole trial, in equivalent epochs (greedy: epochs)."""
        return self.search.epochs or self.curriculum.epochs

    @property
    def pretraining(self) -> PretrainConfig:
        """The config of the run that the search is for, its curriculum as it was given."""
        names = [each.name for each in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})

    def magnitude_of(self, stage: int, end: int | None = None) -> int:
        """Return the RandAugment magnitude of a stage: linear from 0 to that of the last."""
        if self.data.augment is None:
            return 0
        end = self.search.magnitude if end is None else end
        return round(end * stage / max(1, self.search.stages - 1))

    def stages_of(self, bandwidths: Sequence[int], end: int | None = None) -> tuple[Stage, ...]:
        """Return stages of equal share.

        Args:
            bandwidths: of each stage.
            end: RandAugment magnitude of the last; `search.magnitude` by default.
        """
        return tuple(
            Stage(bandwidth, 1.0, self.magnitude_of(place, end))
            for place, bandwidth in enumerate(bandwidths)
        )

    def run_of(
        self,
        stages: tuple[Stage, ...],
        epochs: float,
        folder: Path,
        shares_of: Literal["compute", "images"] = "compute",
    ) -> PretrainConfig:
        """Return the run of a curriculum, in a folder of its own."""
        run = self.pretraining
        curriculum = CurriculumConfig("custom", stages, shares_of, epochs, self.curriculum.cost)
        shown = {stage.bandwidth for stage in stages}  # a run refuses replay of other bandwidths
        replay = {b: times for b, times in (run.data.replay or {}).items() if b in shown}
        return replace(
            run,
            curriculum=curriculum,
            data=replace(run.data, replay=replay or None),
            output=replace(run.output, dir=folder, keep_every=None),
        )
