"""A curriculum resolved to whole steps: the stage of each step, and the compute done before it."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_et.errors import UserError, require
from mae_et.io.plain_files import read_mapping


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a `Plan`, in whole steps."""

    index: int
    """Position in the curriculum, from 0."""
    bandwidth: int
    """Side of the low-frequency crop, in pixels."""
    magnitude: float
    """RandAugment magnitude, in [0, 10]."""
    start: int
    """First step."""
    steps: int
    """Number of steps."""
    cost: float
    """Cost of training on one image, in the unit of the plan's `base_cost`."""


@dataclass(frozen=True)
class Plan:
    """A curriculum resolved to whole steps, read by the training loop.

    Made by `Curriculum.plan`. Schedules (learning rate, weight decay) are functions of `progress`,
    so they need no state beyond the step.
    """

    stages: tuple[PlannedStage, ...]
    base: int
    """Base size, in pixels."""
    base_cost: float
    """Cost of training on one image at the base size: FLOPs, or pixels with the area rule."""
    batch_size: int
    """Images per step, the same in every stage."""
    dataset_size: int
    """Images per epoch."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stages[-1].start + self.stages[-1].steps

    @property
    def bandwidths(self) -> list[int]:
        """Bandwidths of the stages, each once, in rising order."""
        return sorted({stage.bandwidth for stage in self.stages})

    @property
    def images(self) -> int:
        """Number of images trained on, repeats included."""
        return self.steps * self.batch_size

    @property
    def compute(self) -> float:
        """Total cost of all steps, in the unit of `base_cost`."""
        return self.compute_before(self.steps)

    @property
    def equivalent_epochs(self) -> float:
        """Total compute, in epochs at the base size."""
        return self.compute / (self.base_cost * self.dataset_size)

    def at(self, step: int) -> PlannedStage:
        """Return the stage of a step in [0, steps).

        Raises:
            IndexError: the step is outside the plan.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the plan's {self.steps} steps")
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.start) - 1]

    def compute_before(self, step: int) -> float:
        """Return the cost of the steps before `step`, for `step` in [0, steps]."""
        costs = (min(max(step - s.start, 0), s.steps) * s.cost for s in self.stages)
        return self.batch_size * math.fsum(costs)

    def progress(self, step: int) -> float:
        """Return the fraction of the compute done before `step`, in [0, 1]; 0 <= step <= steps."""
        return self.compute_before(step) / self.compute

    def speedup(self, epochs: float) -> float:
        """Return how many times less compute this plan needs than `epochs` epochs at base size."""
        return epochs / self.equivalent_epochs

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-serialisable types."""
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> "Plan":
        """Rebuild a plan from the result of `to_dict`.

        Raises:
            ValueError: the dictionary is not a plan, or not one that a curriculum can resolve to.
        """
        try:
            stages = tuple(PlannedStage(**stage) for stage in plan["stages"])
            found = cls(**plan | {"stages": stages})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"entries are missing or unknown: {error}") from None
        counts = [found.base, found.batch_size, found.dataset_size]
        counts += [count for stage in stages for count in (stage.bandwidth, stage.steps)]
        costs = [found.base_cost, *(stage.cost for stage in stages)]
        if not stages or not all(type(count) is int and 0 < count < 2**53 for count in counts):
            raise ValueError("its sizes and steps must be positive whole numbers")
        if not all(isinstance(cost, (int, float)) and 0 < cost < 1e30 for cost in costs):
            raise ValueError("its costs must be positive numbers")
        start = 0
        for index, stage in enumerate(stages):
            if (stage.index, stage.start) != (index, start):
                raise ValueError("its stages do not follow one another")
            if not isinstance(stage.magnitude, (int, float)) or not 0 <= stage.magnitude <= 10:
                raise ValueError("its magnitudes must lie in [0, 10]")
            start += stage.steps
        return found


def check_replay(plan: Plan, replay: Mapping[int, int], ranks: int) -> None:
    """Refuse `data.replay`, the uses of each image by bandwidth, that does not fit the plan."""
    if not set(replay) <= set(plan.bandwidths):
        raise UserError(
            f"data.replay names the bandwidths {sorted(replay)}, the curriculum has "
            f"{plan.bandwidths}"
        )
    for bandwidth, count in replay.items():
        require(count > 0, f"data.replay must be positive, got {count} at {bandwidth}")
        if plan.batch_size % (count * ranks):
            raise UserError(
                f"optim.batch_size {plan.batch_size} is not divisible by {count} uses of an "
                f"image (data.replay at bandwidth {bandwidth}) on {ranks} ranks"
            )


def read_plan(path: Path) -> Plan:
    """Return the plan in a JSON file; refuse a missing or damaged one."""
    content = read_mapping(path)
    try:
        return Plan.from_dict(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
