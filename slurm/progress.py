"""Progress of a run, read from its folder."""

from pathlib import Path

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.io.metrics_file import read_metrics


def read_progress(folder: Path) -> tuple[int, int]:
    """Return the step of a run's newest checkpoint, and the last step in its metrics.

    A resumed run repeats the steps between them.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    rows = read_metrics(folder)
    saved = checkpoint_step(checkpoints[-1]) if checkpoints else 0
    return saved, rows[-1]["step"] if rows else 0
