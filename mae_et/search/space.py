"""The search space of Bayesian search.

A point has an integer for each stage, the non-decreasing index of its bandwidth among the
candidates, and with augmentation the RandAugment magnitude of the last stage.
"""

import random
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from mae_et.config.schema import Stage
from mae_et.search.config import SearchConfig
from mae_et.search.trials import Trial, whole_trial

Point = dict[str, int]
MAGNITUDE, HIGHEST_MAGNITUDE = "magnitude", 10


class Space:
    """The points of a search and the runs they describe, on a training set of `images` images."""

    def __init__(self, config: SearchConfig, images: int):
        self.config, self.images = config, images
        self.names = [f"stage_{place + 1}" for place in range(config.search.stages)]
        self.top = len(config.candidates) - 1
        self.augments = config.data.augment is not None

    def constant(self) -> Point:
        """Return the point of constant bandwidth."""
        point = dict.fromkeys(self.names, self.top)
        return point | ({MAGNITUDE: self.config.search.magnitude} if self.augments else {})

    def suggest(self, ask: Any) -> Point:
        """Return the point suggested by an Optuna trial."""
        lowest = 0
        for name in self.names:
            lowest = ask.suggest_int(name, lowest, self.top)
        if self.augments:
            ask.suggest_int(MAGNITUDE, 0, HIGHEST_MAGNITUDE)
        return dict(ask.params)

    def nearest(self, point: Point, taken: list[Point], seed: int) -> Point | None:
        """Return the nearest point that is not taken, in steps of one parameter; None if all are.

        The seed breaks ties.
        """
        generator = random.Random(seed)
        seen, queue = {tuple(point.values())}, deque([point])
        while queue:
            current = queue.popleft()
            if current not in taken:
                return current
            new = [each for each in self._neighbours(current) if tuple(each.values()) not in seen]
            generator.shuffle(new)
            seen.update(tuple(each.values()) for each in new)
            queue.extend(new)
        return None

    def _neighbours(self, point: Point) -> Iterator[Point]:
        for name, value in point.items():
            highest = HIGHEST_MAGNITUDE if name == MAGNITUDE else self.top
            for moved in (value - 1, value + 1):
                other = point | {name: moved}
                is_rising = all(other[a] <= other[b] for a, b in pairwise(self.names))
                if 0 <= moved <= highest and is_rising:
                    yield other

    def stages(self, point: Point) -> tuple[Stage, ...]:
        """Return the stages of a point, which have equal compute."""
        bandwidths = [self.config.candidates[point[name]] for name in self.names]
        return self.config.stages_of(bandwidths, point.get(MAGNITUDE))

    def trial(self, point: Point) -> Trial:
        """Return the trial of a point."""
        suffix = f"-m{point[MAGNITUDE]}" if self.augments else ""
        return whole_trial(self.config, self.images, self.stages(point), suffix=suffix)
