"""How far a run is, read from its folder."""

from pathlib import Path

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.io.metrics_file import read_metrics


def reached(folder: Path) -> tuple[int, int]:
    """Return the step of a run's newest checkpoint, and the last step in its metrics.

    What lies between them was done and is done again when the run goes on.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    rows = read_metrics(folder)
    saved = checkpoint_step(checkpoints[-1]) if checkpoints else 0
    return saved, rows[-1]["step"] if rows else 0
