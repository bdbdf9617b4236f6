"""The curriculum: the bandwidth of each step, resolved once to whole steps.

A `Curriculum` is a list of stages that share a budget. `Curriculum.plan` resolves it, for a dataset
and batch size, to a `Plan` of whole steps. The budget is counted in *equivalent epochs*: E of them
cost as much compute as E epochs at the base size.

Sources: EfficientTrain (Wang et al., ICCV 2023, arXiv 2211.09703), EfficientTrain++ (TPAMI 2024,
arXiv 2405.08768).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mae_et.config.schema import CurriculumConfig, Preset, SharesOf, Stage
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.errors import UserError, require, require_choice, require_in

# The papers' bandwidths at base 224, one for each tenth of the budget. Stage i of the ten has
# RandAugment magnitude i, as EfficientTrain++ states; EfficientTrain, whose tenths are epochs
# rather than compute, raises it "linearly from 0 to 9".
_PAPER_BASE = 224
_PAPER_BANDWIDTHS: dict[str, tuple[int, ...]] = {
    "et": (160,) * 6 + (192,) * 2 + (224,) * 2,
    "etpp": (96,) * 2 + (160,) * 4 + (224,) * 4,
    "etpp_deit": (96,) * 2 + (160,) * 4 + (192,) * 2 + (224,) * 2,
    "etpp_convnext": (160,) * 6 + (224,) * 4,
}

MOST_STEPS = 10**9
"""Largest budget, in steps at the base size; a larger one is a typing error."""


def scaled_bandwidth(bandwidth: int, base: int, patch: int) -> int:
    """Scale a published bandwidth (at base 224) to a base size, rounded up to the patch."""
    return -(-bandwidth * base // (_PAPER_BASE * patch)) * patch


@dataclass(frozen=True)
class Curriculum:
    """A sequence of stages that share one budget.

    Bandwidths, `base` and `patch` are in pixels; every bandwidth is a multiple of `patch` and at
    most `base`.

    Raises:
        UserError: there is no stage, a share, the base or the patch is not positive, a magnitude is
            outside [0, 10], or a bandwidth exceeds the base or is not a multiple of the patch.
    """

    stages: tuple[Stage, ...]
    base: int
    """Full bandwidth, in pixels: the side of uncropped inputs."""
    patch: int = 1
    """Side of a patch, in pixels; 1 for networks without patches."""
    shares_of: SharesOf = "compute"
    """Unit of the shares: EfficientTrain++ has stages of equal compute, EfficientTrain of equal
    epochs."""

    def __post_init__(self) -> None:
        stages = (replace(each, bandwidth=each.bandwidth or self.base) for each in self.stages)
        object.__setattr__(self, "stages", tuple(stages))
        require_choice(self.shares_of, SharesOf, "curriculum.shares_of")
        require_in("[1, inf)", self, "base", "patch")
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
                f"curriculum: a RandAugment magnitude must be in [0, 10], got {stage.magnitude}"
            )

    @classmethod
    def preset(cls, name: Preset, base: int = 224, patch: int = 1) -> "Curriculum":
        """Return a published curriculum, scaled to a base size and patch.

        Published bandwidths keep their ratio to the base size and are rounded *up* to a multiple of
        the patch, so that no stage sees less of the spectrum than published.

        Args:
            name: `constant` (one stage at the base size); `et` (EfficientTrain, ICCV 2023);
                `etpp`, `etpp_deit`, `etpp_convnext` (EfficientTrain++, TPAMI 2024).
            base: base size, in pixels.
            patch: side of a patch, in pixels.

        Raises:
            UserError: there is no such preset, base or patch is not positive, or the base is not a
                multiple of the patch.
        """
        constant = cls((Stage(base, 1.0),), base, patch)
        if name == "constant":
            return constant
        if name not in _PAPER_BANDWIDTHS:
            raise UserError(
                f"there is no curriculum {name!r}; "
                f"the presets are constant, {', '.join(_PAPER_BANDWIDTHS)}"
            )
        stages = tuple(
            Stage(scaled_bandwidth(bandwidth, base, patch), 0.1, magnitude)
            for magnitude, bandwidth in enumerate(_PAPER_BANDWIDTHS[name])
        )
        return replace(constant, stages=stages, shares_of="images" if name == "et" else "compute")

    @classmethod
    def from_config(cls, config: CurriculumConfig, base: int, patch: int) -> "Curriculum":
        """Build the curriculum of a config."""
        if config.preset == "custom":
            return cls(config.stages, base, patch, config.shares_of)
        return cls.preset(config.preset, base, patch)

    def plan(
        self,
        epochs: float,
        dataset_size: int,
        batch_size: int,
        cost: Callable[[int], float] | None = None,
        stretch: bool = False,
    ) -> Plan:
        """Resolve the curriculum to whole steps that add up to the budget within one step.

        Each stage ends at the step nearest to the *cumulative* budget, so rounding errors do not
        accumulate.

        Args:
            epochs: budget, in equivalent epochs (plain epochs if `shares_of` is "images").
            dataset_size: images per epoch.
            batch_size: images per step, at most `dataset_size`.
            cost: maps a bandwidth to the cost of one image, in any unit; its area by default.
            stretch: raise a budget that leaves a stage less than one step, to whole epochs.

        Raises:
            UserError: the dataset is empty, the batch is larger than the dataset, a cost is not
                positive and finite, the budget exceeds `MOST_STEPS`, or a stage would have less
                than one step.
        """
        check_batch(batch_size, dataset_size)
        _check_budget(epochs, dataset_size / batch_size)
        cost = cost or (lambda bandwidth: float(bandwidth * bandwidth))
        base_cost = cost(self.base)
        costs = [cost(stage.bandwidth) for stage in self.stages]
        require(
            all(0 < c < math.inf for c in (base_cost, *costs)),
            f"the cost of an image must be positive and finite, got {costs}",
        )
        # The unit of the budget is one image at the base size, or one image of any size.
        units = [c / base_cost if self.shares_of == "compute" else 1.0 for c in costs]
        steps = self._steps(epochs * dataset_size, batch_size, units)
        if min(steps) < 1:

            def fits(epochs: float, batch: int) -> bool:
                return min(self._steps(epochs * dataset_size, batch, units)) >= 1

            least = _first(range(1, 10**6), lambda each: fits(each, batch_size))
            if not (stretch and least):
                most = _first(range(batch_size, 0, -1), lambda each: fits(epochs, each))
                advice = [f"at least {least} epochs"] * bool(least)
                advice += [f"a batch of at most {most}"] * bool(most)
                index = next(index for index, count in enumerate(steps) if count < 1)
                raise UserError(
                    f"curriculum.epochs {epochs:g} leaves stage {index + 1} (bandwidth "
                    f"{self.stages[index].bandwidth}) less than one step of {batch_size} images"
                    + f": give {', or '.join(advice)}"
                    * bool(advice)
                )
            steps = self._steps(least * dataset_size, batch_size, units)
        starts = [0, *accumulate(steps)]
        planned = [
            PlannedStage(i, stage.bandwidth, stage.magnitude, starts[i], steps[i], costs[i])
            for i, stage in enumerate(self.stages)
        ]
        return Plan(tuple(planned), self.base, base_cost, batch_size, dataset_size)

    def _steps(self, images: float, batch_size: int, units: Sequence[float]) -> list[int]:
        """Return the steps of each stage of a budget in images of the base size."""
        total = math.fsum(stage.share for stage in self.stages)
        found: list[int] = []
        due, spent = 0.0, 0.0
        for stage, unit in zip(self.stages, units, strict=True):
            due += images * stage.share / total
            found.append(round((due - spent) / (unit * batch_size)))
            spent += found[-1] * unit * batch_size
        return found

    def with_budget(self, plan: Plan, epochs: float) -> Plan:
        """Lengthen or shorten the last stage of a plan to another budget; others are unchanged.

        Args:
            plan: plan of this curriculum.
            epochs: budget, in the unit of `plan`.

        Raises:
            UserError: the budget exceeds `MOST_STEPS`, or leaves the last stage less than one step.
        """
        _check_budget(epochs, plan.dataset_size / plan.batch_size)
        *earlier, last = plan.stages
        unit = 1.0 if self.shares_of == "images" else None
        units = [unit or stage.cost / plan.base_cost for stage in plan.stages]
        spent = math.fsum(s.steps * u for s, u in zip(earlier, units, strict=False))
        due = epochs * plan.dataset_size / plan.batch_size
        steps = round((due - spent) / units[-1])
        if steps < 1:
            raise UserError(
                f"curriculum.epochs {epochs:g} leaves the last stage less than one step; the "
                f"stages before it, which stay as they are, end at step {last.start:,}"
            )
        return replace(plan, stages=(*earlier, replace(last, steps=steps)))


def _first(numbers: range, fits: Callable[[int], bool]) -> int | None:
    """Return the first number from which numbers fit, or nearly so; None if none does."""
    place = bisect_left(numbers, True, key=fits)  # rounding makes exceptions
    return next(filter(fits, numbers[place : place + 100]), None)


def check_batch(batch_size: int, dataset_size: int) -> None:
    """Refuse a batch that a dataset cannot fill."""
    require(dataset_size > 0, "the dataset is empty")
    small = 1 << max(dataset_size // 4, 1).bit_length() - 1  # at least four steps in an epoch
    require(batch_size > 0, f"optim.batch_size must be positive, got {batch_size}")
    require(
        batch_size <= dataset_size,
        f"optim.batch_size {batch_size} is larger than the dataset of {dataset_size} images: give "
        f"a smaller one (the learning rate scales with it), such as {small}, or start from the "
        "recipes for small datasets, pretrain/small and finetune/small",
    )


def _check_budget(epochs: float, steps_per_epoch: float) -> None:
    steps = epochs * steps_per_epoch
    if not steps <= MOST_STEPS:  # also catches NaN
        raise UserError(
            f"curriculum.epochs {epochs:g} is a budget of {steps:.3g} steps; at most "
            f"{MOST_STEPS:,} are possible"
        )
