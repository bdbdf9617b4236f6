"""Compare speeds in interleaved rounds, so that drift of a shared machine affects every arm."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Speeds of an arm, one for each round."""

    seconds: tuple[float, ...]
    """Time of a call."""
    ratios: tuple[float, ...]
    """Speed relative to the first arm in the same round."""

    @property
    def median_seconds(self) -> float:
        """Median time of a call."""
        return statistics.median(self.seconds)

    def ratio(self) -> str:
        """Return the median ratio, with the minimum and the maximum."""
        middle = statistics.median(self.ratios)
        return f"{middle:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"


def interleave(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Call each arm once per round, in turn; the first is the reference for the others.

    A call must complete its work (synchronise with the GPU). The rounds of the warm-up are not
    timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warm_up + rounds):
        for name, arm in arms.items():
            start = clock()
            arm()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    first = next(iter(seconds.values()))
    return {
        name: Speed(tuple(mine), tuple(a / b for a, b in zip(first, mine, strict=True)))
        for name, mine in seconds.items()
    }
