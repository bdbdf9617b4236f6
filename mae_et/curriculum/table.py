"""Summarise a plan, as plain types and as a table."""

from typing import Any

from mae_et.curriculum.plan import Plan

COMPUTE_UNITS = {"flops": "FLOPs", "area": "pixels"}


LONG_BUDGET = 100  # equivalent epochs from which comparing with MAE's 1600 epochs is meaningful


def summarise(plan: Plan, unit: str, against_epochs: float | None) -> dict[str, Any]:
    """Return a plan's figures as JSON-serialisable types; its costs are in FLOPs or pixels.

    `speedup` compares with `against_epochs` at the base size: for None, MAE's 1600 for budgets of
    at least 100 equivalent epochs, and the plan's own epochs for shorter ones.
    """
    epochs = plan.images / plan.dataset_size
    if against_epochs is None:
        # Rounded, because whole steps may fall short of a budget.
        is_long = round(plan.equivalent_epochs) >= LONG_BUDGET
        against_epochs = 1600.0 if is_long else epochs
    stages = [
        {
            "stage": stage.index,
            "bandwidth": stage.bandwidth,
            "magnitude": stage.magnitude,
            "steps": stage.steps,
            "epochs": stage.steps * plan.batch_size / plan.dataset_size,
            "images": stage.steps * plan.batch_size,
            "compute": stage.steps * plan.batch_size * stage.cost,
            "share": stage.steps * plan.batch_size * stage.cost / plan.compute,
        }
        for stage in plan.stages
    ]
    return {
        "stages": stages,
        "steps": plan.steps,
        "images": plan.images,
        "epochs": epochs,
        "equivalent_epochs": plan.equivalent_epochs,
        "compute": plan.compute,
        "compute_unit": unit,
        "batch_size": plan.batch_size,
        "dataset_size": plan.dataset_size,
        "against_epochs": against_epochs,
        "speedup": plan.speedup(against_epochs),
    }


def plan_table(summary: dict[str, Any]) -> str:
    """Format the result of `summarise` as a table."""
    head = (
        f"{'stage':>5} {'B':>5} {'m':>4} {'steps':>10} {'epochs':>9} {'images':>14} "
        f"{'compute':>10} {'share':>7}"
    )
    rows = [
        f"{s['stage'] + 1:>5} {s['bandwidth']:>5} {s['magnitude']:>4g} {s['steps']:>10,} "
        f"{s['epochs']:>9.2f} {s['images']:>14,} {s['compute']:>10.3g} {s['share']:>7.2%}"
        for s in summary["stages"]
    ]
    total = (
        f"{'total':>16} {summary['steps']:>10,} {summary['epochs']:>9.2f} "
        f"{summary['images']:>14,} {summary['compute']:>10.3g}"
    )
    budget = (
        f"{summary['dataset_size']:,} images, batch {summary['batch_size']:,}; compute in "
        f"{summary['compute_unit']}, as much as {summary['equivalent_epochs']:.1f} epochs at full "
        "bandwidth"
    )
    gain = (
        f"{summary['speedup']:.2f}x less compute than {summary['against_epochs']:.4g} epochs at "
        "constant bandwidth"
    )
    return "\n".join([head, *rows, total, "", budget, gain])
