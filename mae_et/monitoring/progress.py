"""Remaining time of a run."""

from mae_et.io.metrics_file import Row


def seconds_left(row: Row) -> float:
    """Estimate the remaining seconds after a row of metrics, from its compute per second."""
    return row["seconds"] / max(row["compute"], 1e-9) * (1 - row["compute"])


def format_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
