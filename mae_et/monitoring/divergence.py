"""Detect loss spikes and divergence from rows of metrics.

Both are pure functions of the rows, so a resumed run marks the same rows.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from mae_et.io.metrics_file import Row
from mae_et.runtime.console import say

RECENT = 20
FEWEST = 8
DEVIATIONS = 6.0
SMALLEST = 0.01
LAST = 5


def is_spike(row: Row, before: Sequence[Row]) -> bool:
    """Return whether a row's loss jumps above the rows before it in the same stage.

    A spike exceeds the median of the last `RECENT` rows by more than `DEVIATIONS` standard
    deviations and by more than the fraction `SMALLEST` of the median. The deviation is estimated as
    1.4826 times the median absolute deviation, so earlier spikes do not hide later ones. With fewer
    than `FEWEST` rows there is no spike.
    """
    losses = _losses([each for each in before if each.get("stage") == row["stage"]])
    recent = losses[-RECENT:]
    if row["loss"] is None or len(recent) < FEWEST:
        return False
    middle = median(recent)
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return row["loss"] > middle + max(DEVIATIONS * deviation, SMALLEST * abs(middle))


def has_diverged(rows: Sequence[Row]) -> bool:
    """Return whether a run diverged or did not improve.

    It diverged if the median loss of any `LAST` consecutive rows exceeds twice the loss of the
    first step. It did not improve if it has at least `FEWEST` rows, and the median loss of the last
    `LAST` is not below that of the first step.
    """
    losses = _losses(rows)
    if not losses:
        return False
    start = rows[0].get("loss_at_start") or losses[0]
    middles = [median(losses[first : first + LAST]) for first in range(len(losses) - LAST + 1)]
    no_lower = len(losses) >= FEWEST and median(losses[-LAST:]) >= start
    return no_lower or any(middle > 2 * start for middle in middles)


def diagnosis(rows: Sequence[Row]) -> dict[str, Any]:
    """Return final counts of spikes, skipped updates and bad images; warn if the run diverged."""
    diverged = has_diverged(rows)
    if diverged:
        say(
            "warning: the run diverged: its loss rose far above its first value, or ends "
            "no lower (optim.base_lr may be too high)"
        )
    return {
        "diverged": diverged,
        "loss_spikes": sum(bool(row.get("spike")) for row in rows),
        "skipped_updates": sum(row.get("skipped_updates", 0) for row in rows),
        "unreadable_images": rows[-1].get("unreadable", 0) if rows else 0,
        "substituted": sum(row.get("substituted", 0) for row in rows),
    }


def last_loss(rows: Sequence[Row]) -> float | None:
    """Return the loss of the last row that has one; non-finite losses are None."""
    return next(reversed(_losses(rows)), None)


def _losses(rows: Sequence[Row]) -> list[float]:
    """Return the losses of the rows that have one."""
    return [row["loss"] for row in rows if row.get("loss") is not None]
