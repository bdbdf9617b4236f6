"""Tabulate results of `mae-et bench quality`, and plot them against compute and time."""

import math
import re
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mae_et.monitoring.plots import Plot, save_plots

from .arms import CURVES

Rows = dict[str, list[dict[str, Any]]]
"""Figures of each arm's seeds."""

SCORES = {"knn": "kNN", "linear": "linear", "fine_tuned": "fine-tuned"}
COSTS = {"equivalent_epochs": "compute, equivalent epochs", "seconds": "time, s"}
STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t by degrees of freedom; more than 9 count as 9."""
PARTS = 1000
"""Costs tried between two budgets of a curve."""


def table(rows: Rows) -> str:
    """Return the arms as Markdown: means over seeds, and their standard deviation."""
    lines = [
        "| arm | seeds | images | equivalent epochs | time | kNN | linear | fine-tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next((name for name in rows if mean(rows[name], "seconds")), None)
    for name, seeds in rows.items():
        times = mean(seeds, "seconds") / mean(rows[first], "seconds") if first else 0
        scores = " | ".join(_spread(seeds, score) for score in SCORES)
        lines.append(
            f"| {name} | {len(seeds)} | {mean(seeds, 'images'):,.0f} "
            f"| {mean(seeds, 'equivalent_epochs'):.2f} "
            f"| {mean(seeds, 'seconds'):.0f} s ({times:.2f}x) | {scores} |"
        )
    return "\n".join(lines)


def equal_accuracy(rows: Rows) -> str:
    """Return, as Markdown, the compute and time that plain MAE needs to match each arm.

    Every arm is compared with normalised pixels at constant bandwidth, and arms with HOG also with
    HOG at constant bandwidth, as in the paper. Between two budgets of a curve, accuracy is
    interpolated linearly in the logarithm of the cost; beyond them only a bound is given. With
    several seeds the 95% interval of the compute (`cost_interval`) follows.
    """
    plain, hog = CURVES
    others = [name for name in rows if name not in (*CURVES[plain], "untrained")]
    with_hog = [name for name in others if name not in CURVES[hog] and "-hog" in name]
    tables = [_against(rows, plain, others), _against(rows, hog, with_hog)]
    return "\n\n".join(filter(None, tables))


def _against(rows: Rows, title: str, others: Sequence[str]) -> str:
    """Return a table of arms against a curve; empty if either is missing."""
    curve = [name for name in CURVES[title] if name in rows]
    if len(curve) < 2 or not others:
        return ""
    lines = [
        f"Times its compute (its time) that {title} takes for the same accuracy:", "",
        "| arm | " + " | ".join(SCORES.values()) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    for name in others:
        cells = []
        for score in SCORES:
            goal = mean(rows[name], score)
            if goal is None or any(mean(rows[each], score) is None for each in curve):
                cells.append("-")
                continue
            ratios = []
            for cost in COSTS:
                points = [(mean(rows[each], cost), mean(rows[each], score)) for each in curve]
                sign, needed = _needed(points, goal)
                ratios.append(f"{sign}{needed / mean(rows[name], cost):.2f}x")
            cells.append(f"{ratios[0]}{_interval(rows, curve, name, score)} ({ratios[1]})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(rows: Rows, curve: Sequence[str], name: str, score: str) -> str:
    """Return the interval of a factor of compute, after a comma; empty if there is none."""
    cost = "equivalent_epochs"
    costs = [mean(rows[each], cost) for each in curve]
    scores = [[row[score] for row in rows[each]] for each in curve]
    found = cost_interval(costs, scores, [row[score] for row in rows[name]])
    if found is None:
        return ""
    least, most = (each / mean(rows[name], cost) for each in found)
    below, above = "< " * (found[0] == costs[0]), "> " * (found[1] == costs[-1])
    return f", {below}{least:.1f} to {above}{most:.1f}"


def cost_interval(
    costs: Sequence[float], scores: Sequence[Sequence[float]], goal: Sequence[float]
) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the cost at which a curve reaches a score.

    It has every cost at which the curve, interpolated in the logarithm of the cost, and the goal do
    not differ by a t test (Fieller's interval). Seeds of different arms count as independent; the
    test has the degrees of freedom of the arm with the fewest, which makes it wider than Welch's.

    Args:
        costs: of each budget of the curve, rising.
        scores: of each budget's seeds.
        goal: scores of the other arm's seeds.

    Returns:
        The least and the greatest cost, which are bounds where they are an end of the curve; None
        if a score has a single seed or the goal is outside of the curve.
    """
    fewest = min(map(len, (goal, *scores)))
    if fewest < 2:
        return None
    quantile = STUDENT[min(fewest, len(STUDENT)) - 1]
    means = [statistics.mean(seeds) for seeds in (goal, *scores)]
    errors = [statistics.variance(seeds) / len(seeds) for seeds in (goal, *scores)]
    budgets = list(zip(costs, means[1:], errors[1:], strict=True))
    within = [
        cost * (more / cost) ** part
        for (cost, score, error), (more, better, its_error) in pairwise(budgets)
        for part in (number / PARTS for number in range(PARTS + 1))
        if abs((1 - part) * score + part * better - means[0])
        <= quantile * math.sqrt((1 - part) ** 2 * error + part**2 * its_error + errors[0])
    ]
    return (min(within), max(within)) if within else None


def draw(path: Path, rows: Rows) -> None:
    """Draw each score against compute, and below it against time, with deviations over seeds."""
    charts = []
    for cost, label in COSTS.items():
        for score, title in SCORES.items():
            lines, spread = {}, {}
            for name, arms in budgets(rows).items():
                known = [each for each in arms if mean(rows[each], score)]
                if not known or not mean(rows[known[0]], cost):
                    continue  # an untrained arm has no place on a logarithmic axis
                lines[name] = (
                    [mean(rows[each], cost) for each in known],
                    [mean(rows[each], score) for each in known],
                )
                spread[name] = [_deviation(rows[each], score) for each in known]
            if lines:
                charts.append(
                    Plot(title, label, "accuracy, %", lines, spread=spread, doublings=True)
                )
    if charts:
        save_plots(path, charts, rows=len(COSTS))


def budgets(rows: Rows) -> dict[str, list[str]]:
    """Group arms that differ only in their budget, by name; the cheapest comes first."""
    lines: dict[str, list[str]] = {}
    for name in rows:
        lines.setdefault(re.sub(r"-\d+x$", "", name), []).append(name)
    for names in lines.values():
        names.sort(key=lambda name: mean(rows[name], "equivalent_epochs"))
    return lines


def mean(seeds: Sequence[dict[str, Any]], key: str) -> Any:
    """Return the mean over the seeds that have a figure, or None; the median for times.

    Seeds take equal time; if one took longer, the machine had other load.
    """
    values = [row[key] for row in seeds if key in row]
    average = statistics.median if key == "seconds" else statistics.mean
    return average(values) if values else None


def _needed(points: Sequence[tuple[float, float]], goal: float) -> tuple[str, float]:
    """Return the sign (<, > or none) and cost at which a curve of (cost, score) reaches `goal`."""
    if goal <= points[0][1]:
        return ("" if goal == points[0][1] else "< "), points[0][0]
    for (cost, score), (more, better) in pairwise(points):
        if goal <= better:
            share = (goal - score) / (better - score)
            return "", math.exp(math.log(cost) + share * math.log(more / cost))
    return "> ", points[-1][0]


def _deviation(seeds: Sequence[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in seeds if key in row]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(seeds: Sequence[dict[str, Any]], key: str) -> str:
    value = mean(seeds, key)
    if value is None:
        return "-"
    return f"{value:.1f}" + (f" ± {_deviation(seeds, key):.1f}" if len(seeds) > 1 else "")
