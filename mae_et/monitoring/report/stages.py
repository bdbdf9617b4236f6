"""Summarise the stages of a run for a report's staircase and table."""

from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.monitoring.report.records import Record
from mae_et.monitoring.stages import rows_of_stage, summarise_stages


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
    """Return a table row for each stage, with None for values not known yet."""
    found = summarise_stages(record.rows, plan)
    fastest = max((each["images_per_second"] or 0 for each in found), default=0) or 1
    for stage, each in zip(plan.stages, found, strict=True):
        rows = rows_of_stage(record.rows, stage.index)
        each |= {
            "stage": stage,
            "share": each["compute"] / plan.compute,
            "memory": max((row.get("memory_gib", 0.0) for row in rows), default=0.0) or None,
            "bar": 100 * (each["images_per_second"] or 0) / fastest,
        }
    return found
