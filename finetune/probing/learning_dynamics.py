"""Learning dynamics: which frequencies an encoder uses over the course of its training.

Networks learn low frequencies first, which motivates the curriculum (EfficientTrain, arXiv
2211.09703; EfficientTrain++, arXiv 2405.08768). Each kept checkpoint of a run is scored on
low-pass filtered validation images at their full size; the neighbours, or the probe's training
images, are unfiltered.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.image_size import height_and_width
from finetune.probing.features import extract_dataset_features
from finetune.probing.frozen_encoder import (
    FrozenEncoder,
    frozen_encoder_from_weights,
    open_encoder_and_data,
)
from finetune.probing.linear_classifier import train_probe
from finetune.probing.objective import HeldOutAccuracy
from finetune.scoring_config import DynamicsConfig
from mae_et.checkpoints.formats import weights_of_payload
from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.store import load_checkpoint
from mae_et.config.data import DataConfig
from mae_et.config.files import plain
from mae_et.config.typed import typed
from mae_et.curriculum.plan import Plan
from mae_et.data.datasets import open_dataset
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.io.metrics_file import DYNAMICS, Row, read_metrics, row_line
from mae_et.io.plain_files import keep_settings
from mae_et.monitoring.plots import Plot, save_plots
from mae_et.monitoring.tables import markdown_table
from mae_et.probing.nearest_neighbours import knn_accuracy
from mae_et.runtime import distributed
from mae_et.runtime.console import say


def dynamics(config: DynamicsConfig) -> dict[str, Any]:
    """Score each kept checkpoint once, and write `dynamics.md` and `dynamics.png`.

    An encoder without kept checkpoints (a file, a classifier's run, a timm model) is scored once,
    for comparison.

    Returns:
        The folder, the number of checkpoints, and the last one's accuracies in percent.
    """
    config = typed(config, DynamicsConfig)
    paths = list_checkpoints(config.checkpoint / "checkpoints")
    run = recognise(config.checkpoint).config() if paths else None
    if run is None:
        return _score_single(config)
    for key in ("data", "architecture", "encoder_num_heads", "checkpoint_key"):
        if getattr(config, key) is not None:
            raise UserError(f"{key} is for other encoders: {config.checkpoint} records its own")
    if len(paths) <= run.output.keep_last and run.output.keep_every is None:
        say(
            f"{config.checkpoint} has only its last {len(paths)} checkpoints: pre-train with "
            "output.keep_every to score earlier ones"
        )
    size = config.image_size or run.model.image_size
    config = with_bandwidths(config, min(height_and_width(size)))
    folder = config.output or config.checkpoint / "dynamics"
    with sole_writer(folder, "output"):
        check_same_settings(folder, config)
        known = {row["step"]: row for row in read_metrics(folder, DYNAMICS)}
        for path in paths:
            if checkpoint_step(path) not in known:
                row = score_checkpoint(config, path)
                known[row["step"]] = row
                # Rewritten, not appended: a truncated line would hide those after it.
                lines = (row_line(known[step], DYNAMICS) for step in sorted(known))
                write_text_atomically(folder / DYNAMICS, "".join(lines))
        return _write(folder, config, [known[step] for step in sorted(known)])


def _score_single(config: DynamicsConfig) -> dict[str, Any]:
    """Score an encoder that has no kept checkpoints."""
    encoder, data = open_encoder_and_data(config)
    folder, base = config.output, min(encoder.image_size)
    if folder is None:
        raise UserError(
            f"output must be given: {config.checkpoint} has no checkpoints of a run, so its "
            "encoder alone is scored"
        )
    config = with_bandwidths(config, base)
    accuracies = _accuracies(config, encoder, data)
    row = {"step": 0, "equivalent_epochs": 0.0, "trained_at": base, "accuracies": accuracies}
    with sole_writer(folder, "output"):
        return _write(folder, config, [row])


def _write(folder: Path, config: DynamicsConfig, rows: list[Row]) -> dict[str, Any]:
    """Write the table and the chart; return the results."""
    write_text_atomically(folder / "dynamics.md", table(config, rows))
    draw(folder / "dynamics.png", config, rows)
    last = dict(zip(map(str, config.bandwidths), rows[-1]["accuracies"], strict=True))
    return {"dynamics": str(folder), "by": config.by, "checkpoints": len(rows), "last": last}


def with_bandwidths(config: DynamicsConfig, base: int) -> DynamicsConfig:
    """Return a config with its bandwidths, by default eighths of the base size, in rising order."""
    for bandwidth in config.bandwidths:
        if bandwidth > base:
            raise UserError(f"bandwidths: {bandwidth} is larger than the image size {base}")
    eighths = (max(1, round(base * part / 8)) for part in (1, 2, 3, 4, 6, 8))
    return replace(config, bandwidths=tuple(sorted(set(config.bandwidths or eighths))))


def check_same_settings(folder: Path, config: DynamicsConfig) -> None:
    """Refuse to mix scores of different settings in one table."""
    # Relative to the folder, so that a run may be moved, and named from any working directory.
    run = os.path.relpath(config.checkpoint.resolve(), folder.resolve())
    settings = plain(config) | {"checkpoint": run}
    for free in ("batch_size", "num_workers", "device", "step_timeout", "output", "feature_cache"):
        del settings[free]
    keep_settings(folder / "settings.json", settings, f"{folder} has scores of other settings")


def score_checkpoint(config: DynamicsConfig, path: Path) -> Row:
    """Return a checkpoint's step, compute and accuracies in percent."""
    try:
        saved = load_checkpoint(path)
    except ValueError as error:
        raise UserError(f"{error}; delete it to score the others") from None
    plan, step = Plan.from_dict(saved["plan"]), saved["step"]
    encoder = frozen_encoder_from_weights(weights_of_payload(path, saved))
    encoder = encoder.at_size(config.image_size)
    del saved
    assert encoder.data is not None  # the checkpoint of a run records them
    accuracies = _accuracies(config, encoder, encoder.data)
    stage = plan.at(max(0, step - 1))
    say(f"step {step}: {accuracies}")
    return {
        "step": step,
        "equivalent_epochs": round(plan.progress(step) * plan.equivalent_epochs, 4),
        "trained_at": stage.bandwidth,
        "accuracies": accuracies,
    }


def _accuracies(config: DynamicsConfig, encoder: FrozenEncoder, data: DataConfig) -> list[float]:
    """Return the top-1 accuracy at each bandwidth, in percent."""
    device = distributed.choose_device(config.device)
    indices = _draw_images(config, data, encoder.channels)
    train = extract_dataset_features(encoder, data, config, "train", device, indices).to(device)
    probe = train_probe(train, config.epochs, config.seed) if config.by == "linear" else None
    accuracies = []
    for bandwidth in config.bandwidths:
        whole = None if bandwidth == min(encoder.image_size) else bandwidth
        val = extract_dataset_features(encoder, data, config, "val", device, bandwidth=whole).to(
            device
        )
        if probe is not None:
            found = probe.accuracy(val)
        else:
            found = knn_accuracy(train, val, config.neighbours, config.temperature)
        accuracies.append(round(found, 2))
    return accuracies


def _draw_images(config: DynamicsConfig, data: DataConfig, channels: int) -> list[int] | None:
    if config.images is None:
        return None
    count = len(open_dataset(data, "train", channels))
    rest, held_out = HeldOutAccuracy(images=config.images, seed=config.seed).split(count)
    return [*rest, *held_out]


def table(config: DynamicsConfig, rows: list[Row]) -> str:
    """Return accuracies as a Markdown table with a row for each checkpoint."""
    shown = [f"val at {bandwidth}" for bandwidth in config.bandwidths]
    cells = [
        [str(row["step"]), f"{row['equivalent_epochs']:.2f}", str(row["trained_at"])]
        + [f"{accuracy:.1f}" for accuracy in row["accuracies"]]
        for row in rows
    ]
    return markdown_table(["step", "equivalent epochs", "trained at", *shown], cells) + "\n"


def draw(path: Path, config: DynamicsConfig, rows: list[Row]) -> None:
    """Plot absolute and relative accuracies against compute, with one line per bandwidth."""
    across = [row["equivalent_epochs"] for row in rows]
    lines, shares = {}, {}
    for place, bandwidth in enumerate(config.bandwidths):
        up = [row["accuracies"][place] for row in rows]
        lines[f"B = {bandwidth}"] = (across, up)
        shares[f"B = {bandwidth}"] = (across, [value / (up[-1] or 1) for value in up])
    axis = "compute, equivalent epochs"
    charts = [
        Plot("Low-pass filtered validation images", axis, f"{config.by} accuracy, %", lines),
        Plot("Relative to the last checkpoint", axis, "share of the last accuracy", shares),
    ]
    save_plots(path, charts)
