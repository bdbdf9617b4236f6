"""Progress of a run on stderr: a progress bar on a terminal, plain lines elsewhere."""

import shutil
import sys
from typing import Any

from tqdm import tqdm

from mae_et.curriculum.plan import Plan
from mae_et.io.metrics_file import Row
from mae_et.monitoring.figures import (
    figure_name,
    format_figure,
    format_seconds,
    is_error,
    seconds_left,
)
from mae_et.runtime.console import write_line

# tqdm's own estimate assumes steps of equal cost, so the bar shows ours, and only ours.
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar}| {desc}"
WIDTH = 80


class Terminal:
    """Show the progress of a run that starts after `start` steps."""

    def __init__(self, plan: Plan, start: int):
        self.plan = plan
        self.bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            width = min(WIDTH, shutil.get_terminal_size().columns - 1)
            self.bar = tqdm(
                total=plan.steps, initial=start, ncols=width, bar_format=BAR_FORMAT,
                mininterval=1, miniters=1,
            )  # fmt: skip

    def advance(self, step: int) -> None:
        """Move the bar to a step; it is drawn at most once a second."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show_metrics(self, row: Row) -> None:
        """Show a row of metrics."""
        spike = " | loss spike" if row.get("spike") else ""
        if self.bar is None:
            write_line(describe(row, self.plan) + spike)
        else:
            self.advance(row["step"])
            self.bar.set_description_str(summary(row) + spike.replace(" |", ","))

    def show_scores(self, step: int, scores: dict[str, Any]) -> None:
        """Show validation or probe scores, accuracies with their standard errors."""
        images = scores.get("val_images")
        shown = " | ".join(
            f"{figure_name(key)} {value:.1f} s"
            if key == "probe_seconds"
            else f"{figure_name(key)} {format_figure(key, value, images) or 'non-finite'}"
            for key, value in scores.items()
            if key != "train_images" and not is_error(key)
        )
        write_line(f"step {step}/{self.plan.steps} | {shown}")

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def describe(row: Row, plan: Plan) -> str:
    """Return a row of metrics as a log line."""
    return (
        f"step {row['step']}/{plan.steps} | stage {row['stage'] + 1}/{len(plan.stages)} "
        f"B={row['bandwidth']} | loss {_loss(row)} | lr {row['lr']:.2e} | "
        f"{row['images_per_second']:.0f} img/s | data wait {row['data_time_fraction']:.0%} | "
        f"ETA {format_seconds(seconds_left(row))}"
    )


def summary(row: Row) -> str:
    """Return a row of metrics, short enough to fit beside a progress bar."""
    return (
        f"B={row['bandwidth']}, loss {_loss(row)}, {row['images_per_second']:.0f} img/s, "
        f"ETA {format_seconds(seconds_left(row))}"
    )


def _loss(row: Row) -> str:
    return "non-finite" if row["loss"] is None else f"{row['loss']:.4f}"
