"""The probes of a pre-training, as recorded in scores.jsonl."""

from collections.abc import Sequence
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.io.metrics_file import Row

MEASURES = ("knn", "ridge", "effective_rank")
PROBED_IMAGES = ("train_images", "val_images")
"""Numbers of images that vote or are fitted, and of those that are classified."""


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
