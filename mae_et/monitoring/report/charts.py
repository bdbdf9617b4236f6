"""Layout of line charts: axes, ticks and paths in pixels, drawn as SVG by the page's template."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mae_et.monitoring.figures import short

Points = list[tuple[float, float]]

# Long curves keep the minimum and the maximum of each column of pixels.
COLUMNS = 300
DOTS = 90
MANY = 10
"""Values; a few may lie above the axis."""


class Frame(NamedTuple):
    """Size of a chart, and the edges of the frame in which curves are drawn, in pixels."""

    width: int = 460
    height: int = 284
    left: int = 60
    right: int = 446
    top: int = 26
    bottom: int = 234


FRAME = Frame()


@dataclass(frozen=True)
class Curve:
    """A line."""

    colour: int
    points: Points
    dashed: bool = False
    texts: list[str] = field(default_factory=list)
    """Tooltips of the points."""


@dataclass(frozen=True)
class Band:
    """An interval of the x axis, with a label above it."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve in pixels."""

    colour: int
    dashed: bool
    width: float
    path: str
    dots: list[tuple[float, float, str]]


@dataclass(frozen=True)
class SvgChart:
    """A chart in pixels."""

    title: str
    x_label: str
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bands: list[tuple[float, float, str]]
    marks: list[tuple[float, str]]
    lines: list[Line]


def chart(
    title: str,
    x_label: str,
    curves: Sequence[Curve],
    bands: Sequence[Band] = (),
    marks: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    stairs: bool = False,
    note: str = "",
) -> SvgChart | None:
    """Lay out curves; None if no curve has a point.

    Args:
        title: name of the y axis.
        x_label: name and unit of the x axis.
        curves: lines over the same axes.
        bands: intervals of the x axis to shade.
        marks: positions on the x axis to mark, with tooltips.
        from_zero: whether the y axis starts at zero.
        stairs: whether a value holds until the next point.
        note: remark below the chart.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return None
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    left, right = min(0.0, *xs), max(xs)
    low, high, above = _limits(ys, from_zero)
    y_ticks = ticks(low, high)
    room = 0.04 * (high - low)
    low, high = low - (0 if from_zero else room), high + room
    across = _scale(left, right, FRAME.left, FRAME.right)
    up = _scale(low, high, FRAME.bottom, FRAME.top)
    cut = f"{above} {'value' if above == 1 else 'values'} above the axis, up to {short(max(ys))}"
    places = [(across(band.start), across(min(band.end, right)), band.label) for band in bands]
    return SvgChart(
        title,
        x_label,
        ". ".join(part for part in (note, cut if above else "") if part),
        [(across(value), tick_label(value)) for value in ticks(left, right)],
        [(up(value), tick_label(value)) for value in y_ticks],
        [(start, end, label) for start, end, label in places if end > start],
        [(across(x), text) for x, text in marks],
        # Step functions overlap: the lower ones are drawn wider to stay visible.
        [
            _line(curve, across, up, stairs, 2 + 1.6 * stairs * (len(drawn) - 1 - place))
            for place, curve in enumerate(drawn)
        ],
    )


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers (1, 2 or 5 times a power of ten) within an interval."""
    rough = (high - low) / 5
    if not rough > 1e-300:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Format a tick in few characters, to fit beside the axis: 1.5M, 0.02, 6e-4."""
    if value == 0 or abs(value) >= 0.01:
        return short(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def thinned(points: Points, columns: int = COLUMNS) -> Points:
    """Return at most two points per column, the minimum and the maximum, in order."""
    if len(points) <= 2 * columns:
        return points
    kept: Points = []
    for column in range(columns):
        start, end = (place * len(points) // columns for place in (column, column + 1))
        places = range(start, end)
        ends = {
            min(places, key=lambda i: points[i][1]), max(places, key=lambda i: points[i][1]),
        }  # fmt: skip
        kept += [points[i] for i in sorted(ends)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _limits(ys: list[float], from_zero: bool) -> tuple[float, float, int]:
    """Return the ends of the y axis and the number of values above it.

    A small number of outliers that would flatten the curve, such as a run's first losses, may lie
    above it.
    """
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    common = ordered[int(0.9 * (len(ordered) - 1))]
    if len(ordered) > MANY and low < common and high > common + 3 * (common - low):
        high = common + 1.5 * (common - low)
    if from_zero:
        low = min(0.0, low)
    if not high > low:
        room = abs(high) or 1.0
        low, high = low - room / 2, high + room / 2
    return low, high, sum(y > high for y in ys)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    # Far outside the chart the exact position does not matter; clamp it to few digits.
    return lambda value: round(min(max(start + (value - low) / span * (end - start), -1e4), 1e4), 1)


def _line(
    curve: Curve,
    across: Callable[[float], float],
    up: Callable[[float], float],
    stairs: bool,
    width: float,
) -> Line:
    points = curve.points if stairs else thinned(curve.points)
    path: list[str] = []
    for x, y in points:
        if stairs and path:
            path.append(f"H{across(x):g}")
        path.append(f"{'L' if path else 'M'}{across(x):g},{up(y):g}")
    every = max(1, math.ceil(len(curve.points) / DOTS))
    dots = [
        (across(x), max(up(y), FRAME.top), text)
        for (x, y), text in list(zip(curve.points, curve.texts, strict=False))[::every]
    ]
    return Line(curve.colour, curve.dashed, width, " ".join(path), dots)
