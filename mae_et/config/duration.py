"""Durations in a config (steps, or a share of the run), and when periodic work is due."""

import re

from mae_et.errors import UserError

Duration = int | str


def duration_in_steps(duration: Duration, total_steps: int, key: str = "duration") -> int:
    """Convert a number of steps, or a share of the run such as "5%", to steps (at least 1).

    Raises:
        UserError: neither a positive whole number nor a percentage in (0, 100].
    """
    text = str(duration).strip()
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return int(text)
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if share and 0 < float(share[1]) <= 100:
        return max(1, round(total_steps * float(share[1]) / 100))
    raise UserError(f"{key} must be a number of steps or a share such as 5%, got {duration!r}")


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Return whether periodic work is due after a step: at multiples of `every` and at the end.

    A multiple less than half an interval before the last step is skipped.
    """
    left = total_steps - step
    return left == 0 or (step % every == 0 and 2 * left >= every)
