"""The curricula among which Bayesian search chooses.

A point is a number for each stage, the place of its bandwidth among the candidates, never falling,
and where there is augmentation the RandAugment magnitude of the last stage.
"""

import random
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from mae_et.config.schema import Stage
from mae_et.search.config import SearchConfig
from mae_et.search.trials import Trial
from mae_et.training.plan import make_plan

Point = dict[str, int]
MAGNITUDE, HIGHEST_MAGNITUDE = "magnitude", 10


class Space:
    """The points of a search, and the runs that they stand for.

    Args:
        config: the search.
        images: size of the training set.
    """

    def __init__(self, config: SearchConfig, images: int):
        self.config, self.images = config, images
        self.names = [f"stage_{place + 1}" for place in range(config.search.stages)]
        self.top = len(config.candidates) - 1
        self.augments = config.data.augment is not None

    def constant(self) -> Point:
        """Return constant bandwidth."""
        point = dict.fromkeys(self.names, self.top)
        return point | ({MAGNITUDE: self.config.search.magnitude} if self.augments else {})

    def suggest(self, ask: Any) -> Point:
        """Return the point that one of Optuna's trials suggests."""
        lowest = 0
        for name in self.names:
            lowest = ask.suggest_int(name, lowest, self.top)
        if self.augments:
            ask.suggest_int(MAGNITUDE, 0, HIGHEST_MAGNITUDE)
        return dict(ask.params)

    def is_whole(self, point: Point) -> bool:
        """Return whether every parameter is there."""
        return {*self.names, *([MAGNITUDE] if self.augments else [])} <= set(point)

    def nearest(self, point: Point, taken: list[Point], seed: int) -> Point | None:
        """Return a point, not taken, that is as few single steps away as can be; None if all are.

        Args:
            point: where to start.
            taken: points that do not do.
            seed: of the choice among equals.
        """
        generator = random.Random(seed)
        seen, queue = {tuple(point.values())}, deque([point])
        while queue:
            here = queue.popleft()
            if here not in taken:
                return here
            around = [each for each in self._around(here) if tuple(each.values()) not in seen]
            generator.shuffle(around)
            seen.update(tuple(each.values()) for each in around)
            queue.extend(around)
        return None

    def _around(self, point: Point) -> Iterator[Point]:
        for name, value in point.items():
            highest = HIGHEST_MAGNITUDE if name == MAGNITUDE else self.top
            for moved in (value - 1, value + 1):
                other = point | {name: moved}
                rises = all(other[a] <= other[b] for a, b in pairwise(self.names))
                if 0 <= moved <= highest and rises:
                    yield other

    def stages(self, point: Point) -> tuple[Stage, ...]:
        """Return the stages of a point, of equal compute."""
        bandwidths = [self.config.candidates[point[name]] for name in self.names]
        return self.config.stages_of(bandwidths, point.get(MAGNITUDE))

    def trial(self, point: Point) -> Trial:
        """Return the run of a point.

        Raises:
            UserError: the budget leaves a stage no step.
        """
        stages = self.stages(point)
        name = "B" + "-".join(f"{stage.bandwidth:03d}" for stage in stages)
        name += f"-m{point[MAGNITUDE]}" if self.augments else ""
        folder = self.config.output.dir / "trials" / name
        run = self.config.run_of(stages, self.config.budget, folder)
        return Trial(run, make_plan(run, self.images))
