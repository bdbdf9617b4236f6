"""Stages of a run, for the staircase and the table of a report."""

from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.monitoring.report.records import Record, number


def staircase(plan: Plan, step: int) -> list[dict[str, Any]]:
    """Return a stair for each bandwidth: percentages of compute, of images, and completed."""
    stairs: list[dict[str, Any]] = []
    total = plan.equivalent_epochs
    for stage in plan.stages:
        start, end = stage.start, stage.start + stage.steps
        if not stairs or stairs[-1]["bandwidth"] != stage.bandwidth:
            stairs.append({"bandwidth": stage.bandwidth, "start": start, "stages": []})
        stairs[-1]["end"] = end
        stairs[-1]["stages"].append(stage)
    for stair in stairs:
        before, after = plan.progress(stair["start"]), plan.progress(stair["end"])
        done = (plan.progress(min(max(step, stair["start"]), stair["end"])) - before) / (
            after - before
        )
        stair |= {
            "height": 100 * stair["bandwidth"] / plan.base,
            "compute": 100 * (after - before),
            "images": 100 * (stair["end"] - stair["start"]) / plan.steps,
            "epochs": f"{after * total:.4g}",
            "done": 100 * done,
        }
    return stairs


def stages(record: Record, plan: Plan) -> list[dict[str, Any]]:
    """Return a table row for each stage; None for what is not known yet."""
    found: list[dict[str, Any]] = []
    for stage in plan.stages:
        rows = [row for row in record.rows if row.get("stage") == stage.index]
        steps = sum(number(row, "window_steps") or 0 for row in rows)
        seconds = sum(number(row, "window_seconds") or 0 for row in rows)
        waited = sum(
            (number(row, "data_time_fraction") or 0) * (number(row, "window_seconds") or 0)
            for row in rows
        )
        found.append({
            "stage": stage,
            "share": stage.steps * stage.cost * plan.batch_size / plan.compute,
            "images": stage.steps * plan.batch_size,
            "loss": number(rows[-1], "loss") if rows else None,
            "speed": steps * plan.batch_size / seconds if seconds else None,
            "wait": min(1.0, waited / seconds) if seconds else None,
            "memory": max((number(row, "memory_gib") or 0 for row in rows), default=0) or None,
        })  # fmt: skip
    fastest = max((each["speed"] or 0 for each in found), default=0) or 1
    return [each | {"bar": 100 * (each["speed"] or 0) / fastest} for each in found]
