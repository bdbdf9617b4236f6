"""The curriculum: which bandwidth is shown at which step, resolved once into whole steps.

A `Curriculum` is a list of stages that share a budget. `Curriculum.plan` turns it, for a data set
and a batch, into a `Plan` of whole steps that a training loop only looks up. The budget is counted
in *equivalent epochs*: E of them are the compute of E epochs at the base size.

Sources: EfficientTrain (Wang et al., ICCV 2023, arXiv 2211.09703), EfficientTrain++ (TPAMI 2024,
arXiv 2405.08768).
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mae_et.config.schema import CurriculumConfig, Preset, Stage
from mae_et.errors import UserError

__all__ = ["Curriculum", "Plan", "PlannedStage", "Stage"]

# Bandwidths of the papers, at base 224, one for each tenth of the budget. Stage i of the ten has
# RandAugment magnitude i: stated so for EfficientTrain++, and "linearly from 0 to 9" for the ICCV
# form, whose tenths are of epochs rather than of compute.
_PAPER_BASE = 224
_PAPER_BANDWIDTHS: dict[str, tuple[int, ...]] = {
    "et": (160,) * 6 + (192,) * 2 + (224,) * 2,
    "etpp": (96,) * 2 + (160,) * 4 + (224,) * 4,
    "etpp_deit": (96,) * 2 + (160,) * 4 + (192,) * 2 + (224,) * 2,
    "etpp_convnext": (160,) * 6 + (224,) * 4,
}


def carried_over(bandwidth: int, base: int, patch: int) -> int:
    """Carry a bandwidth of the papers, at base 224, to another base and up to the patch."""
    return -(-bandwidth * base // (_PAPER_BASE * patch)) * patch


@dataclass(frozen=True)
class PlannedStage:
    """A stage in whole steps."""

    index: int
    """Place in the curriculum, from 0."""
    bandwidth: int
    """Side of the low-frequency crop, in pixels."""
    magnitude: float
    """RandAugment magnitude."""
    start: int
    """First step."""
    steps: int
    """Number of steps."""
    cost: float
    """Cost of one image, in the unit of the plan's `base_cost`."""


@dataclass(frozen=True)
class Plan:
    """A curriculum in whole steps: what the training loop reads and never changes."""

    stages: tuple[PlannedStage, ...]
    base: int
    """Base size, in pixels."""
    base_cost: float
    """Cost of one image at the base size (FLOPs, or pixels under the area rule)."""
    batch_size: int
    """Images per step, constant over stages."""
    dataset_size: int
    """Images in an epoch."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stages[-1].start + self.stages[-1].steps

    @property
    def images(self) -> int:
        """Images seen, repeats counted."""
        return self.steps * self.batch_size

    @property
    def compute(self) -> float:
        """Cost of all steps, in the unit of `base_cost`."""
        return self.compute_before(self.steps)

    @property
    def equivalent_epochs(self) -> float:
        """Compute in epochs at the base size."""
        return self.compute / (self.base_cost * self.dataset_size)

    def at(self, step: int) -> PlannedStage:
        """Return the stage of a step in [0, steps).

        Raises:
            IndexError: the plan has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside of the plan's {self.steps} steps")
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.start) - 1]

    def compute_before(self, step: int) -> float:
        """Return the cost of the steps before `step`, for `step` in [0, steps]."""
        costs = (min(max(step - s.start, 0), s.steps) * s.cost for s in self.stages)
        return self.batch_size * math.fsum(costs)

    def progress(self, step: int) -> float:
        """Return the share of the compute done before `step`, in [0, 1]."""
        return self.compute_before(step) / self.compute

    def speedup(self, epochs: float) -> float:
        """Return the compute of `epochs` constant-bandwidth epochs divided by this plan's."""
        return epochs / self.equivalent_epochs

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> "Plan":
        """Rebuild a plan from `to_dict`."""
        return cls(**plan | {"stages": tuple(PlannedStage(**stage) for stage in plan["stages"])})


@dataclass(frozen=True)
class Curriculum:
    """Stages in order, at a base size.

    Raises:
        UserError: no stage, a share that is not positive, or a bandwidth that is larger than the
            base or no multiple of the patch.
    """

    stages: tuple[Stage, ...]
    base: int
    """Full bandwidth: side of the input in the last stages, in pixels."""
    patch: int = 1
    """Side of a patch, in pixels; 1 where the network has none."""
    shares_of: Literal["compute", "images"] = "compute"
    """What the shares divide: EfficientTrain++ gives stages of equal compute, EfficientTrain
    stages of equal epochs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise UserError("curriculum.stages is empty")
        for stage in self.stages:
            self._check(stage)

    def _check(self, stage: Stage) -> None:
        if stage.bandwidth > self.base:
            raise UserError(
                f"curriculum: bandwidth {stage.bandwidth} exceeds the base size {self.base}"
            )
        if stage.bandwidth <= 0 or stage.bandwidth % self.patch:
            raise UserError(
                f"curriculum: bandwidth {stage.bandwidth} is not a multiple of the patch size "
                f"{self.patch}"
            )
        if not 0 < stage.share < 1e100:
            raise UserError(f"curriculum: a stage's share must be positive, got {stage.share}")
        if not 0 <= stage.magnitude <= 10:
            raise UserError(
                f"curriculum: a RandAugment magnitude lies in [0, 10], got {stage.magnitude}"
            )

    @classmethod
    def preset(cls, name: Preset, base: int = 224, patch: int = 1) -> "Curriculum":
        """Return a published curriculum, carried to another base size and patch.

        The papers' bandwidths at 224 keep their share of the base and are rounded *up* to a
        multiple of the patch: never less spectrum than published.

        Raises:
            UserError: no such preset, or a base that is no multiple of the patch.
        """
        if name == "constant":
            return cls((Stage(base, 1.0),), base, patch)
        if name not in _PAPER_BANDWIDTHS:
            raise UserError(
                f"there is no curriculum {name!r}; "
                f"presets: constant, {', '.join(_PAPER_BANDWIDTHS)}"
            )
        stages = tuple(
            Stage(carried_over(bandwidth, base, patch), 0.1, magnitude)
            for magnitude, bandwidth in enumerate(_PAPER_BANDWIDTHS[name])
        )
        return cls(stages, base, patch, "images" if name == "et" else "compute")

    @classmethod
    def from_config(cls, config: CurriculumConfig, base: int, patch: int) -> "Curriculum":
        """Return the curriculum of a config.

        Raises:
            UserError: see the class and `preset`.
        """
        if config.preset == "custom":
            return cls(config.stages, base, patch, config.shares_of)
        return cls.preset(config.preset, base, patch)

    def plan(
        self,
        epochs: float,
        dataset_size: int,
        batch_size: int,
        cost: Callable[[int], float] | None = None,
    ) -> Plan:
        """Resolve the curriculum to whole steps that add up to the budget within one step.

        Each stage ends where the *running sum* of the budget does, to the nearest step, so that
        roundings do not pile up.

        Args:
            epochs: budget, in equivalent epochs.
            dataset_size: images in an epoch.
            batch_size: images per step.
            cost: cost of an image at a bandwidth; its area by default.

        Raises:
            UserError: a batch larger than the data, or a budget that leaves a stage no step.
        """
        if dataset_size < 1:
            raise UserError("the data set is empty")
        if batch_size > dataset_size:
            raise UserError(
                f"optim.batch_size {batch_size} is larger than the data set "
                f"of {dataset_size} images"
            )
        cost = cost or (lambda bandwidth: float(bandwidth * bandwidth))
        base_cost = cost(self.base)
        costs = [cost(stage.bandwidth) for stage in self.stages]
        # One unit of the budget: an image at the base size, or any image.
        units = [c / base_cost if self.shares_of == "compute" else 1.0 for c in costs]
        total = math.fsum(stage.share for stage in self.stages)
        planned: list[PlannedStage] = []
        start, due, spent = 0, 0.0, 0.0
        for index, (stage, unit) in enumerate(zip(self.stages, units, strict=True)):
            due += epochs * dataset_size * stage.share / total
            steps = round((due - spent) / (unit * batch_size))
            if steps < 1:
                raise UserError(
                    f"curriculum.epochs {epochs:g} leaves stage {index} (bandwidth "
                    f"{stage.bandwidth}) less than one step of {batch_size} images"
                )
            spent += steps * unit * batch_size
            planned.append(
                PlannedStage(index, stage.bandwidth, stage.magnitude, start, steps, costs[index])
            )
            start += steps
        return Plan(tuple(planned), self.base, base_cost, batch_size, dataset_size)
