"""Progress of a command over images or passes on stderr."""

import time

from tqdm import tqdm

from mae_et.monitoring.figures import format_seconds
from mae_et.runtime.console import is_main, say

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Show how much of a task is done: a bar on a terminal, a line every 30 seconds elsewhere.

    `done` of the total were done before. Without `bar`, a terminal shows the lines too.
    """

    def __init__(self, task: str, total: int, done: int = 0, unit: str = "image", bar: bool = True):
        self.task, self.total, self.done, self.unit = task, total, done, unit
        self.bar = tqdm(
            total=total, initial=done, desc=task, unit=unit, leave=False,
            disable=None if bar else True,
        )  # fmt: skip
        self.first, self.start = done, time.monotonic()
        self.said = self.start

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, count: int) -> None:
        """Count what was done since the last call."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if not self.bar.disable or not is_main() or now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = now
        left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
        say(
            f"{self.task}: {self.done:,} of {self.total:,} {self.unit}s, "
            f"{format_seconds(left)} left"
        )
