"""Log a run to metrics.jsonl and scores.jsonl, TensorBoard and the terminal.

When a run resumes from a checkpoint, rows of later steps are dropped from both files.
"""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import check_in_place
from mae_et.io.metrics_file import METRICS, SCORES, Row, read_metrics, row_line
from mae_et.io.plain_files import append_line, no_follow
from mae_et.monitoring.divergence import RECENT, is_spike
from mae_et.monitoring.image_grid import save_png
from mae_et.monitoring.run_record import image_path
from mae_et.monitoring.tensorboard import PREVIEW, TensorBoardWriter
from mae_et.monitoring.terminal import Terminal


class RunLogger:
    """Logs metrics, scores and images of a run; exists on the main rank only.

    Rows after the step `start` are dropped from the folder. `check_lock` raises `RunFailed` if the
    folder is no longer the locked one.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        start: int,
        check_lock: Callable[[], None] = lambda: None,
    ):
        self.folder = config.output.dir
        self.check_lock = check_lock
        self.folder.mkdir(parents=True, exist_ok=True)
        found = read_metrics(self.folder, is_whole=_is_complete)
        rows = [row for row in found if row["step"] <= start]
        if found and start == 0:
            warnings.warn(
                f"{self.folder} has metrics up to step {found[-1]['step']} but no checkpoint: "
                "the run restarts at step 0",
                stacklevel=2,
            )
        found = read_metrics(self.folder, SCORES, is_whole=_is_numeric)
        # A run that starts at step 0 probes its initial weights itself.
        scores = [row for row in found if row["step"] <= start] if start > 0 else []
        self._rewrite(METRICS, rows)
        self._rewrite(SCORES, scores)
        self.metrics = open(  # noqa: SIM115
            self.folder / METRICS, "a", encoding="utf-8", opener=no_follow
        )
        self.tensorboard = (
            TensorBoardWriter(config, plan, rows, scores) if config.output.tensorboard else None
        )
        self.terminal = Terminal(plan, start)
        self.recent = rows[-RECENT:]

    def advance(self, step: int) -> None:
        """Show that a step is done; cheap enough for every step."""
        self.terminal.advance(step)

    def check_in_place(self) -> None:
        """Check that the run folder and its records were not deleted, moved or replaced."""
        self.check_lock()
        check_in_place(self.folder / METRICS, self.metrics.fileno())

    def log(self, row: Row) -> None:
        """Log a row of metrics."""
        self.check_in_place()
        row["time"] = time.time()
        row["spike"] = is_spike(row, self.recent)
        self.recent = [*self.recent, row][-RECENT:]
        self.metrics.write(row_line(row, METRICS))
        self.metrics.flush()
        if self.tensorboard is not None:
            self.tensorboard.add_metrics(row)
        self.terminal.show_metrics(row)

    def log_scores(self, step: int, scores: dict[str, float | None]) -> None:
        """Log validation or probe scores."""
        self.check_in_place()
        row = {"step": step, "time": time.time()} | scores
        append_line(self.folder / SCORES, row_line(row, SCORES))
        if self.tensorboard is not None:
            self.tensorboard.add_scores(row)
        self.terminal.show_scores(step, scores)

    def log_image(self, step: int, image: Tensor) -> None:
        """Save an image of reconstructions, uint8 [C H W], as PNG and to TensorBoard."""
        self.check_in_place()
        save_png(image_path(self.folder, step), image)
        if self.tensorboard is not None:
            self.tensorboard.add_image(step, image)

    def log_preview(self, draw: Callable[[], Tensor | None]) -> None:
        """Save the preview of a run, uint8 [C H W]; draw it only if the folder has none."""
        if (self.folder / PREVIEW).exists():
            return
        image = draw()
        if image is None:
            return
        self.check_in_place()
        save_png(self.folder / PREVIEW, image)
        if self.tensorboard is not None:
            self.tensorboard.add_preview(image)

    def has_image(self, step: int) -> bool:
        """Return whether the image of a step was saved."""
        return image_path(self.folder, step).exists()

    def has_scores(self, step: int) -> bool:
        """Return whether scores of a step were logged."""
        return any(row["step"] == step for row in read_metrics(self.folder, SCORES))

    def flush(self) -> None:
        """Write all rows to disk; called before each checkpoint, which relies on them."""
        self.check_in_place()
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def log_results(self, results: dict[str, Any]) -> None:
        """Log the final figures."""
        if self.tensorboard is not None:
            self.tensorboard.add_results(results)

    def close(self) -> None:
        """Close the files and the progress bar."""
        self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.terminal.close()

    def _rewrite(self, name: str, rows: list[Row]) -> None:
        if rows or os.path.lexists(self.folder / name):
            text = "".join(row_line(row, name) for row in rows)
            write_text_atomically(self.folder / name, text)


def _is_numeric(row: Row) -> bool:
    """Return whether a row has a time and only numbers or nulls."""
    numbers = [value for value in row.values() if value is not None]
    return "time" in row and all(
        isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        for value in numbers
    )


def _is_complete(row: Row) -> bool:
    """Return whether a row of metrics has its coordinates; disk corruption may rename a key."""
    places = [row.get(key) for key in ("time", "stage", "bandwidth", "equivalent_epochs")]
    return _is_numeric(row) and all(
        isinstance(place, (int, float)) and abs(place) < 1e15 for place in places
    )
