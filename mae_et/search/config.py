"""Config of a curriculum search."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mae_et.config.keys import key
from mae_et.config.schema import CurriculumConfig, OutputConfig, PretrainConfig, Stage
from mae_et.curriculum.schedule import scaled_bandwidth
from mae_et.errors import require, require_in

# Candidate bandwidths of both papers, at their base size of 224.
PAPER_BANDWIDTHS = (96, 128, 160, 192, 224)


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search."""

    strategy: Literal["sequential", "greedy", "bayes"] = key("sequential", "common")
    """sequential: stage by stage at fixed compute (EfficientTrain++); greedy: the smallest
    bandwidths that match constant bandwidth, stages of equal epochs (EfficientTrain, ICCV 2023);
    bayes: whole curricula of non-decreasing bandwidths at fixed compute, by Optuna."""
    stages: int = key(10, "common")
    """Number of stages, of equal share."""
    candidates: tuple[int, ...] = ()
    """Candidate bandwidths; by default the papers' 96, 128, 160, 192 and 224, scaled to the base
    size and rounded up to a multiple of the patch size."""
    epochs: float | None = None
    """Budget of a trial, in the unit of curriculum.epochs, which is the default. The best
    curriculum is written for curriculum.epochs."""
    finetune: float = 0.05
    """sequential: length of the brief training at full bandwidth before scoring, as a fraction of
    the budget."""
    tolerance: float = 0.0
    """greedy: how far a score may lie below that of constant bandwidth and still match it, in the
    unit of the objective."""
    trials: int = key(20, "search")
    """bayes: number of trials; a finished search resumes with a larger number."""
    prune_from: float | None = 0.6
    """bayes: fraction of the compute from which, at each stage's end, a trial below the median of
    earlier ones is pruned. The objective then also scores unfinished runs. null, or a cluster,
    disables pruning."""
    magnitude: int = 9
    """RandAugment magnitude of the last stage (0 to 10); magnitudes rise linearly from 0. Used if
    data.augment is set; bayes then searches it."""
    objective: str = key("knn", "common")
    """Metric to maximise: knn or linear accuracy on held-out training images, or
    package.module:function, which maps a run folder to a number."""
    held_out: float = 0.1
    """Fraction of the labelled training images held out to measure accuracy. Neighbours and probes
    never see their labels; pre-training uses the images like all others."""
    images: int | None = None
    """Random subset of the training images to compute the accuracy from; all by default."""
    cluster: str | None = key(None, "search")
    """Cluster config (file or shipped name, see mae-et submit) on which independent trials run as
    parallel jobs. By default trials run in this process, one after another."""
    at_once: int = key(4, "search")
    """bayes on a cluster: number of trials to propose at once."""
    keep_checkpoints: bool = key(False, "search")
    """Whether to keep the checkpoints of eliminated trials."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "search.stages", "search.trials", "search.at_once")
        require_in("(0, inf)", self, "search.images", "search.epochs")
        require_in("(0, 1)", self, "search.finetune", "search.held_out", "search.prune_from")
        require_in("[0, inf)", self, "search.tolerance")
        require_in("[0, 10]", self, "search.magnitude")
        require(
            self.strategy != "greedy" or self.stages > 1,
            "search.stages must be at least 2: greedy keeps the last stage at full bandwidth",
        )
        require(
            self.objective in {"knn", "linear"}
            or re.fullmatch(r"[\w.]+:[\w.]+", self.objective) is not None,
            f"search.objective must be knn, linear or package.module:function, "
            f"got {self.objective!r}",
        )


@dataclass(frozen=True)
class SearchConfig(PretrainConfig):
    """Search a curriculum for the run described by the other keys.

    curriculum.epochs and curriculum.cost set the budget; the search replaces preset and stages.
    """

    output: OutputConfig = field(default_factory=lambda: OutputConfig(dir=Path("runs/search")))
    search: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        base, patch = self.model.image_size, self.model.patch
        for bandwidth in self.search.candidates:
            require(
                0 < bandwidth <= base and bandwidth % patch == 0,
                f"search.candidates: {bandwidth} is not a multiple of the patch size {patch} "
                f"up to the base size {base}",
            )
        require(len(self.candidates) > 1, "search.candidates needs at least two bandwidths")

    @property
    def candidates(self) -> tuple[int, ...]:
        """Candidate bandwidths in ascending order."""
        base, patch = self.model.image_size, self.model.patch
        carried = (scaled_bandwidth(bandwidth, base, patch) for bandwidth in PAPER_BANDWIDTHS)
        return tuple(sorted(set(self.search.candidates or carried)))

    @property
    def budget(self) -> float:
        """Compute of a full-length trial, in equivalent epochs (greedy: epochs)."""
        return self.search.epochs or self.curriculum.epochs

    @property
    def pretraining(self) -> PretrainConfig:
        """Config of the run to search for, with its own curriculum."""
        names = [each.name for each in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})

    def stages_of(self, bandwidths: Sequence[int], end: int | None = None) -> tuple[Stage, ...]:
        """Return stages of equal share, with RandAugment magnitudes that rise linearly from 0.

        The last stage has the magnitude `end`, by default `search.magnitude`.
        """
        last = max(1, self.search.stages - 1)
        end = self.search.magnitude if end is None else end
        end = 0 if self.data.augment is None else end
        return tuple(
            Stage(bandwidth, 1.0, round(end * place / last))
            for place, bandwidth in enumerate(bandwidths)
        )

    def run_of(
        self,
        stages: tuple[Stage, ...],
        epochs: float,
        folder: Path,
        shares_of: Literal["compute", "images"] = "compute",
    ) -> PretrainConfig:
        """Return the config of a run with given stages, in its own folder."""
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
