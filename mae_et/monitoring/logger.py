"""What a run tells: metrics.jsonl, TensorBoard, a progress bar or plain lines, and pictures.

`metrics.jsonl` is the record; the TensorBoard file is written from the same rows. When a run goes
on from a checkpoint, rows after it are dropped and the event file is written again from those that
stay, so that no reader sees a step twice; its predecessor stays behind, empty.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.io import encode_png, read_image
from tqdm import tqdm

from mae_et.config.files import numeric_keys, to_yaml
from mae_et.curriculum.schedule import Plan
from mae_et.io.atomic import write_atomically, write_text_atomically
from mae_et.io.metrics_file import SCORES, Row, read_metrics
from mae_et.monitoring.divergence import RECENT, is_spike
from mae_et.monitoring.progress import format_seconds, seconds_left
from mae_et.runtime.console import say

# Where each number of a row stands in TensorBoard.
TAGS = {
    "loss": "loss/train",
    "grad_norm": "optim/grad_norm",
    "skipped_updates": "optim/skipped_updates",
    "lr": "optim/lr",
    "weight_decay": "optim/weight_decay",
    "bandwidth": "schedule/bandwidth",
    "magnitude": "schedule/magnitude",
    "epoch": "schedule/epoch",
    "equivalent_epochs": "schedule/equivalent_epochs",
    "images_per_second": "speed/images_per_second",
    "substituted": "data/substituted",
    "unreadable": "data/unreadable",
    "data_time_fraction": "speed/data_time_fraction",
    "memory_gib": "speed/memory_gib",
}


class RunLogger:
    """Writes what the main process of a run reports.

    Args:
        config: the run's config.
        plan: its plan.
        start: steps already done; rows after it are dropped.
    """

    def __init__(self, config: Any, plan: Plan, start: int):
        self.folder = config.output.dir
        self.config, self.plan = config, plan
        self.folder.mkdir(parents=True, exist_ok=True)
        found = read_metrics(self.folder, is_whole=_can_be_shown)
        rows = [row for row in found if row["step"] <= start]
        if found and start == 0:
            warnings.warn(
                f"{self.folder} has a record up to step {found[-1]['step']}, but no checkpoint: "
                "the run begins again at step 0",
                stacklevel=2,
            )
        self._rewrite("metrics.jsonl", rows)
        found = read_metrics(self.folder, SCORES, is_whole=_is_of_numbers)
        scores = [row for row in found if row["step"] <= start]
        self._rewrite(SCORES, scores)
        self.record = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.writer: SummaryWriter | None = None
        if config.output.tensorboard:
            self._open_tensorboard(rows, scores)
        self.recent = rows[-RECENT:]
        self.bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=plan.steps, initial=start, unit="step", dynamic_ncols=True)

    def log(self, row: Row) -> None:
        """Report a row of metrics."""
        row["time"] = time.time()
        row["spike"] = is_spike(row, self.recent)
        self.recent = [*self.recent, row][-RECENT:]
        self.record.write(json.dumps(row) + "\n")
        self.record.flush()
        self._scalars(row)
        line = describe(row, self.plan)
        if row["spike"]:
            line += " | the loss leaps"
        if self.bar is None:
            say(line)
        else:
            self.bar.update(row["step"] - self.bar.n)
            self.bar.set_postfix_str(line.split(" | ", 1)[1], refresh=True)

    def score(self, step: int, scores: dict[str, float]) -> None:
        """Report accuracies on held-out data."""
        row = {"step": step, "time": time.time()} | scores
        with (self.folder / SCORES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._scores(row)
        found = " | ".join(f"{key} {value:g}" for key, value in scores.items())
        say(f"step {step}/{self.plan.steps} | validation: {found}")

    def picture(self, step: int, image: Tensor) -> None:
        """Keep a picture, uint8 [C H W], as PNG and in TensorBoard."""
        path = self._picture(step)
        content = encode_png(image).numpy().tobytes()
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        if self.writer is not None:
            self.writer.add_image("reconstructions", image, step)

    def has_picture(self, step: int) -> bool:
        """Return whether the picture of a step is kept."""
        return self._picture(step).exists()

    def _picture(self, step: int) -> Path:
        return self.folder / "reconstructions" / f"step-{step:08d}.png"

    def flush(self) -> None:
        """Put all rows on disk: called before a checkpoint, which promises them."""
        self.record.flush()
        os.fsync(self.record.fileno())
        if self.writer is not None:
            self.writer.flush()

    def finish(self, results: dict[str, Any]) -> None:
        """Keep the final figures beside the hyper-parameters."""
        if self.writer is None:
            return
        settings = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in numeric_keys(self.config).items()
        }
        # Named so that they stand behind the curves: a point each, for the table of settings.
        final = {f"summary/{k}": v for k, v in results.items() if isinstance(v, (int, float))}
        # `add_hparams` would open a second run; these three summaries are what it writes.
        file_writer: Any = self.writer.file_writer
        for summary in hparams(settings, final):
            file_writer.add_summary(summary)
        for tag, value in final.items():
            self.writer.add_scalar(tag, value, self.plan.steps)

    def close(self) -> None:
        """Close the files."""
        self.record.close()
        if self.writer is not None:
            self.writer.close()
        if self.bar is not None:
            self.bar.close()

    def _rewrite(self, name: str, rows: list[Row]) -> None:
        if rows or (self.folder / name).exists():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text_atomically(self.folder / name, text)

    def _open_tensorboard(self, rows: list[Row], scores: list[Row]) -> None:
        old = [path for path in self.folder.glob("events.out.tfevents.*") if path.is_file()]
        # From step 0 on: a TensorBoard that is open forgets what it read from the old file.
        self.writer = SummaryWriter(str(self.folder), purge_step=0)
        self.writer.add_text("config", f"```yaml\n{to_yaml(self.config)}```")
        for row in rows:
            self._scalars(row)
        for row in scores:
            self._scores(row)
        for path in sorted((self.folder / "reconstructions").glob("step-*.png")):
            digits = path.stem.removeprefix("step-")
            if not (digits.isdecimal() and rows and int(digits) <= rows[-1]["step"]):
                continue
            try:
                image = read_image(str(path))
            except RuntimeError:
                warnings.warn(f"{path} is damaged: it is left out of TensorBoard", stacklevel=2)
                continue
            self.writer.add_image("reconstructions", image, int(digits))
        self.writer.flush()
        # Emptied, not deleted: an open TensorBoard would wait for ever at a file that is gone.
        for path in old:
            os.truncate(path, 0)

    def _scores(self, row: Row) -> None:
        if self.writer is None:
            return
        step, when = row["step"], row["time"]
        # Steps of runs with other batches are other amounts: images and compute are not.
        axes = {
            "validation": step,
            "validation_by_compute": round(
                1000 * self.plan.progress(step) * self.plan.equivalent_epochs
            ),
            "validation_by_images": step * self.plan.batch_size,
        }
        for key, value in row.items():
            if key not in {"step", "time"}:
                for axis, place in axes.items():
                    self.writer.add_scalar(f"{axis}/{key}", value, place, walltime=when)

    def _scalars(self, row: Row) -> None:
        """Write a row against the step, and against the compute done in thousandths of an epoch."""
        if self.writer is None:
            return
        when = row["time"]
        # Counted from 1 wherever a person reads it, as in a plan; from 0 in metrics.jsonl.
        tags = TAGS | {"loss_of_stage": f"loss/stage_{row['stage'] + 1}_B{row['bandwidth']}"}
        compute = round(1000 * row["equivalent_epochs"])
        for key, tag in tags.items():
            value = row.get("loss" if key == "loss_of_stage" else key)
            if not isinstance(value, (int, float)):  # not finite, or lost to a damaged disk
                continue
            self.writer.add_scalar(tag, value, row["step"], walltime=when)
            by_compute = tag.replace("/", "_by_compute/")
            self.writer.add_scalar(by_compute, value, compute, walltime=when)
        if row.get("spike"):
            self.writer.add_scalar("loss/spikes", row["loss"], row["step"], walltime=when)


def _is_of_numbers(row: Row) -> bool:
    """Return whether all that a row holds are numbers, or none, and it has a step and a time."""
    numbers = [value for value in row.values() if value is not None]
    return "time" in row and all(
        isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        for value in numbers
    )


def _can_be_shown(row: Row) -> bool:
    """Return whether a row of metrics says where its numbers stand; a flipped bit is in a name."""
    places = [row.get(key) for key in ("time", "stage", "bandwidth", "equivalent_epochs")]
    return _is_of_numbers(row) and all(
        isinstance(place, (int, float)) and abs(place) < 1e15 for place in places
    )


def describe(row: Row, plan: Plan) -> str:
    """Return a row as the line that a log shows."""
    loss = "lost" if row["loss"] is None else f"{row['loss']:.4f}"
    return (
        f"step {row['step']}/{plan.steps} | stage {row['stage'] + 1}/{len(plan.stages)} "
        f"B={row['bandwidth']} | loss {loss} | lr {row['lr']:.2e} | "
        f"{row['images_per_second']:.0f} img/s | data wait {row['data_time_fraction']:.0%} | "
        f"ETA {format_seconds(seconds_left(row))}"
    )
