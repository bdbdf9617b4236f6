"""How long a run still takes, by its metrics."""

from mae_et.io.metrics_file import Row


def seconds_left(row: Row) -> float:
    """Return the time that a run needs from a row of metrics on, at its pace so far."""
    return row["seconds"] / max(row["compute"], 1e-9) * (1 - row["compute"])


def format_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
