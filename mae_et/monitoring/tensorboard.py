"""Write a run's TensorBoard event file from its rows of metrics and scores.

Tag names decide the order on the page, which is alphabetical: accuracy, features, loss and
reconstructions come first. Resuming rewrites the file from the kept rows, so that no step appears
twice. `SummaryWriter(purge_step=N)` alone cannot do this: it drops every point
at or after N, also of the curves against compute and images, whose axes do not count steps.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.functional import pil_to_tensor

from mae_et.config.files import numeric_keys, to_yaml
from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.io.metrics_file import Row
from mae_et.io.plain_files import no_follow
from mae_et.monitoring.figures import FIGURES, is_error
from mae_et.monitoring.run_record import RunRecord
from mae_et.monitoring.summaries import PROBED_IMAGES

TAGS = {
    "loss": "loss/train",
    "bandwidth": "schedule/bandwidth",
    "magnitude": "schedule/magnitude",
    "epoch": "schedule/epoch",
    "equivalent_epochs": "schedule/equivalent_epochs",
    "lr": "schedule/lr",
    "weight_decay": "schedule/weight_decay",
    "images_per_second": "speed/images_per_second",
    "data_time_fraction": "speed/data_time_fraction",
    "checkpoint_seconds": "speed/checkpoint_seconds",
    "memory_gib": "speed/memory_gib",
    "grad_norm": "training/grad_norm",
    "skipped_updates": "training/skipped_updates",
    "substituted": "training/substituted_images",
    "unreadable": "training/unreadable_images",
}
SCORE_TAGS = {"effective_rank": "features/effective_rank", "probe_seconds": "speed/probe_seconds"}
"""Tags of scores that are neither an accuracy nor a loss."""
PREVIEW = "preview.png"
# Zero in a healthy run: their charts appear with the first other value.
USUALLY_ZERO = {"skipped_updates", "substituted", "unreadable"}


class TensorBoardWriter:
    """Writes the event file of a run, first the rows of earlier steps."""

    def __init__(self, config: RunConfig, plan: Plan, rows: list[Row], scores: list[Row]):
        self.config, self.plan, self.folder = config, plan, config.output.dir
        self.hidden = set(USUALLY_ZERO)
        if config.data.augment is None:
            self.hidden.add("magnitude")
        found = self.folder.glob("events.out.tfevents.*")
        old = sorted(path for path in found if path.is_file() and not path.is_symlink())
        # purge_step 0: an open TensorBoard discards the points of the old file.
        self.writer = SummaryWriter(str(self.folder), purge_step=0)
        self.writer.add_text("config", f"```yaml\n{to_yaml(config)}```")
        for row in rows:
            self.add_metrics(row)
        for row in scores:
            self.add_scores(row)
        self._add_saved_images(last=rows[-1]["step"] if rows else 0)
        self.writer.flush()
        # The newest is truncated, and deleted at the next start: an open TensorBoard, which reads
        # the files by name, would wait forever at a deleted one.
        for path in old[-1:]:
            with open(path, "ab", opener=no_follow) as file:
                file.truncate(0)
        for path in old[:-1]:
            path.unlink()

    def add_metrics(self, row: Row) -> None:
        """Add a row of metrics."""
        step, when, loss = row["step"], row["time"], row.get("loss")
        for key, tag in TAGS.items():
            value = row.get(key)
            if key in USUALLY_ZERO and value:
                self.hidden.discard(key)
            if key not in self.hidden:
                self._add(tag, value, step, when)
        # Stages count from 1 in everything people read, from 0 in metrics.jsonl.
        self._add(f"stages/loss_{row['stage'] + 1}_B{row['bandwidth']}", loss, step, when)
        self._add("vs_compute/loss", loss, round(1000 * row["equivalent_epochs"]), when)
        if row.get("spike"):
            self._add("training/loss_spikes", loss, step, when)

    def add_scores(self, row: Row) -> None:
        """Add validation or probe scores against steps, compute and images."""
        step, when = row["step"], row["time"]
        compute = round(1000 * self.plan.progress(step) * self.plan.equivalent_epochs)
        for key, value in row.items():
            # Numbers of images are constant, and standard errors follow from them.
            if key in {"step", "time", *PROBED_IMAGES} or is_error(key):
                continue
            tag = SCORE_TAGS.get(key, f"accuracy/{key}")
            if key.endswith("loss"):
                tag = f"loss/{key.replace('val_loss', 'validation')}"
            self._add(tag, value, step, when)
            if tag.startswith("speed/"):
                continue
            name = key.replace("val_loss", "validation_loss")
            self._add(f"vs_compute/{name}", value, compute, when)
            self._add(f"vs_images/{name}", value, step * self.plan.batch_size, when)

    def add_image(self, step: int, image: Tensor) -> None:
        """Add an image of reconstructions, uint8 [C H W]."""
        self.writer.add_image("reconstructions", image, step)

    def add_preview(self, image: Tensor) -> None:
        """Add the preview of the encoder's inputs, uint8 [C H W]."""
        self.writer.add_image("preview", image, 0)

    def add_results(self, results: dict[str, Any]) -> None:
        """Add the config and the final figures for the HPARAMS tab.

        The tab shows five columns of each. Without an experiment summary it computes which keys
        differ between runs and shows these first, so only the start and end of the session are
        written. Figures are the last points of scalars, in the alphabetical order of their tags
        (TensorBoard 2.21 leaves them empty if the log directory is the run's own folder: it names
        that run "." and looks for its scalars in "./.").
        """
        settings = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in numeric_keys(self.config).items()
        }
        _, session_start, session_end = hparams(settings, {})
        file_writer: Any = self.writer.file_writer
        file_writer.add_summary(session_start)
        file_writer.add_summary(session_end)
        for key in FIGURES:
            self._add(f"results/{key}", results.get(key), self.plan.steps)

    def flush(self) -> None:
        """Write buffered points to disk."""
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()

    def _add(self, tag: str, value: Any, step: int, when: float | None = None) -> None:
        if isinstance(value, (int, float)):  # None: not finite, or lost with a damaged disk
            self.writer.add_scalar(tag, value, step, walltime=when)

    def _add_saved_images(self, last: int) -> None:
        if (self.folder / PREVIEW).exists():
            self._add_saved(self.folder / PREVIEW, self.add_preview)
        for step, path in RunRecord(self.folder).reconstructions(last).items():
            self._add_saved(path, partial(self.add_image, step))

    def _add_saved(self, path: Path, add: Callable[[Tensor], None]) -> None:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                add(pil_to_tensor(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            warnings.warn(f"{path} is damaged: skipped in TensorBoard", stacklevel=3)
