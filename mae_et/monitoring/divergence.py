"""Losses that leap, and runs that do not train: told from the rows of metrics alone.

Both are functions of the record, so a run that goes on marks what it would have marked.
"""

import contextlib
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

RECENT = 20
FEWEST = 8
DEVIATIONS = 6.0
SMALLEST = 0.01
LAST = 5

Row = dict[str, Any]


def is_spike(row: Row, before: Sequence[Row]) -> bool:
    """Return whether a row's loss leaps above those before it in the same stage.

    It does if it exceeds the median of the last `RECENT` rows by more than `DEVIATIONS` standard
    deviations and by more than `SMALLEST` of the median. The deviation is estimated as 1.4826 times
    the median absolute deviation, so that earlier spikes do not hide later ones. Of fewer than
    `FEWEST` rows nothing is said.
    """
    losses = _losses([each for each in before if each.get("stage") == row["stage"]])
    recent = losses[-RECENT:]
    if row["loss"] is None or len(recent) < FEWEST:
        return False
    middle = median(recent)
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return row["loss"] > middle + max(DEVIATIONS * deviation, SMALLEST * abs(middle))


def has_diverged(rows: Sequence[Row]) -> bool:
    """Return whether a run was lost on the way, or ends no better than it began.

    It was lost if the median loss of any `LAST` rows that follow each other is above twice the loss
    of its first step; and it is no better if that of its last ones is not below it.
    """
    losses = _losses(rows)
    if len(losses) < 2:
        return False
    start = rows[0].get("loss_at_start") or losses[0]
    middles = [median(losses[first : first + LAST]) for first in range(len(losses) - LAST + 1)]
    return any(middle > 2 * start for middle in middles) or median(losses[-LAST:]) >= start


def diagnosis(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a run's final figures of what went wrong, and say so where it does not train."""
    diverged = has_diverged(rows)
    if diverged:
        with contextlib.suppress(OSError):  # of a terminal that was closed
            print(
                "mae-et: warning: the loss went far above where it began, or ends no lower: the "
                "run has diverged (optim.base_lr may be why)",
                file=sys.stderr,
            )
    return {
        "diverged": diverged,
        "loss_spikes": sum(bool(row.get("spike")) for row in rows),
        "skipped_updates": sum(row.get("skipped_updates", 0) for row in rows),
        "unreadable_images": rows[-1].get("unreadable", 0) if rows else 0,
        "substituted": sum(row.get("substituted", 0) for row in rows),
    }


def last_loss(rows: Sequence[Row]) -> float | None:
    """Return the loss of the last row that has one: of lost steps there is none."""
    return next(reversed(_losses(rows)), None)


def _losses(rows: Sequence[Row]) -> list[float]:
    """Return the losses of the rows that have one."""
    return [row["loss"] for row in rows if row.get("loss") is not None]
