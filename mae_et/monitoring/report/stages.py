"""Summarise the stages of a run for a report's staircase and table."""

from itertools import groupby
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.monitoring.report.records import ReportedRun
from mae_et.monitoring.summaries import rows_of_stage, summarise_stages


def staircase(plan: Plan, step: int) -> list[dict[str, Any]]:
    """Return a stair for each bandwidth: percentages of compute, of images, and completed."""
    stairs = []
    for bandwidth, group in groupby(plan.stages, key=lambda stage: stage.bandwidth):
        stages = list(group)
        start, end = stages[0].start, stages[-1].start + stages[-1].steps
        before, after = plan.progress(start), plan.progress(end)
        reached = plan.progress(min(max(step, start), end))
        stairs.append({
            "bandwidth": bandwidth,
            "stages": stages,
            "height": 100 * bandwidth / plan.base,
            "compute": 100 * (after - before),
            "images": 100 * (end - start) / plan.steps,
            "epochs": f"{after * plan.equivalent_epochs:.4g}",
            "done": 100 * (reached - before) / (after - before),
        })  # fmt: skip
    return stairs


def stages(record: ReportedRun, plan: Plan) -> list[dict[str, Any]]:
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
