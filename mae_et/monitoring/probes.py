"""The probes of a pre-training, as recorded in scores.jsonl."""

from collections.abc import Sequence
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.io.metrics_file import Row

MEASURES = ("knn", "ridge", "effective_rank")


def summarise_probes(rows: Sequence[Row], plan: Plan, training_seconds: float) -> dict[str, Any]:
    """Return what results.json says of the probes; nothing if there were none.

    Args:
        rows: one for each probe.
        plan: the run's plan.
        training_seconds: time of the run without its pauses.

    Returns:
        `probe_` and a measure: that of the last probe; `probe_time_fraction`: share of the run's
        time that the probes took; `probes`: step, compute done and measures of each.
    """
    if not rows:
        return {}
    curve = [
        {"step": row["step"], "compute": plan.progress(row["step"]), **_measures(row)}
        for row in rows
    ]
    seconds = sum(row.get("probe_seconds") or 0.0 for row in rows)
    return {
        **{f"probe_{key}": value for key, value in _measures(rows[-1]).items()},
        "probe_time_fraction": seconds / (seconds + training_seconds),
        "probes": curve,
    }


def _measures(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in MEASURES if key in row}
