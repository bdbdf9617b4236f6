"""Durations in a config: a number of steps, or a share of the run."""

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
