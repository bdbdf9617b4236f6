"""Summarise the stages and the probes of a run for results.json, from its rows."""

from collections.abc import Sequence
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.io.metrics_file import Row
from mae_et.monitoring.divergence import last_loss

MEASURES = ("knn", "ridge", "effective_rank")
PROBED_IMAGES = ("train_images", "val_images")
"""Numbers of images that vote or are fitted, and of those that are classified."""


def summarise_stages(rows: Sequence[Row], plan: Plan) -> list[dict[str, Any]]:
    """Return bandwidth, images, compute, last loss, speed and data time of each stage of a run.

    Loss, images per second and the fraction of time spent waiting for data are None for a stage
    without rows (not reached, or lost to a damaged disk).
    """
    summary = []
    for stage in plan.stages:
        mine = rows_of_stage(rows, stage.index)
        images = stage.steps * plan.batch_size
        seen = sum(row.get("window_steps", 0) for row in mine) * plan.batch_size
        seconds = sum(row.get("window_seconds", 0.0) for row in mine)
        waited = sum(
            row.get("data_time_fraction", 0.0) * row.get("window_seconds", 0.0) for row in mine
        )
        summary.append({
            "bandwidth": stage.bandwidth,
            "images": images,
            "loss": last_loss(mine),
            "images_per_second": round(seen / seconds, 1) if seconds else None,
            "data_time_fraction": round(min(1.0, waited / seconds), 4) if seconds else None,
            "compute": stage.cost * images,
        })  # fmt: skip
    return summary


def rows_of_stage(rows: Sequence[Row], index: int) -> list[Row]:
    """Return the rows of metrics of a stage."""
    return [row for row in rows if row.get("stage") == index]


def summarise_probes(rows: Sequence[Row], plan: Plan, training_seconds: float) -> dict[str, Any]:
    """Return the entries of results.json about the probes; empty if there were none.

    Returns:
        `probe_MEASURE`: each measure of the last probe; `probe_train_images` and
        `probe_val_images`: its numbers of images; `probe_time_fraction`: fraction of the run's time
        spent on probes; `probes`: step, compute done and measures of each.
    """
    if not rows:
        return {}
    curve = [
        {"step": row["step"], "compute": plan.progress(row["step"]), **_measures(row)}
        for row in rows
    ]
    seconds = sum(row.get("probe_seconds") or 0.0 for row in rows)
    return {
        **{f"probe_{key}": rows[-1][key] for key in (*MEASURES, *PROBED_IMAGES) if key in rows[-1]},
        "probe_time_fraction": seconds / (seconds + training_seconds),
        "probes": curve,
    }


def _measures(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in MEASURES if key in row}
