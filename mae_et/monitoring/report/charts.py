"""Line charts as numbers: axes, ticks and paths, which the page's template draws as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 460, 284
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 26, 50
COLOURS = 8
# More points than pixels say nothing; of each column the smallest and the largest are kept.
COLUMNS = 300
DOTS = 90
PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Curve:
    """A named line."""

    name: str
    colour: int
    points: Points
    dashed: bool = False
    texts: list[str] = field(default_factory=list)
    """What a point says when it is pointed at."""


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis, with a label above it."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in pixels, and its number."""

    place: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve in pixels."""

    name: str
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
    x_ticks: list[Tick]
    y_ticks: list[Tick]
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
    """Lay curves out; None where no curve has a point.

    Args:
        title: what is drawn.
        x_label: what it is drawn against, with the unit.
        curves: lines over the same axes.
        bands: stretches of the x axis to tell apart.
        marks: places on the x axis to point at, with their texts.
        from_zero: whether the y axis starts at zero.
        stairs: whether a value holds until the next point.
        note: a remark below.
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
    across = _scale(left, right, LEFT, WIDTH - RIGHT)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP)
    cut = f"{above} higher {'value is' if above == 1 else 'values are'} cut off" if above else ""
    places = [(across(band.start), across(min(band.end, right)), band.label) for band in bands]
    return SvgChart(
        title,
        x_label,
        ". ".join(part for part in (note, cut) if part),
        [Tick(across(value), short(value)) for value in ticks(left, right)],
        [Tick(up(value), short(value)) for value in y_ticks],
        [(start, end, label) for start, end, label in places if end > start],
        [(across(x), text) for x, text in marks],
        # Stairs lie on each other for long: those below are wider, and so stay visible.
        [
            _line(curve, across, up, stairs, 2 + 1.6 * stairs * (len(drawn) - 1 - place))
            for place, curve in enumerate(drawn)
        ],
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) within an interval."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def short(value: float, unit: str = "") -> str:
    """Write a number in few signs: 12k, 1.5M, 0.0012, 3e-05, and with a unit 1.5 TFLOPs."""
    for one, prefix in PREFIXES:
        if abs(value) >= max(one * 0.99995, 1e4 - 0.5):
            return f"{value / one:.4g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.4g} {unit}".strip()


def thinned(points: Points, columns: int = COLUMNS) -> Points:
    """Return at most two points for each column, its lowest and its highest, in order."""
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
    """Return the y axis's ends, and how many values lie above it.

    A few values that would press all others flat, as the first losses of a run do, are cut off.
    """
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    common = ordered[int(0.9 * (len(ordered) - 1))]
    if low < common and high > common + 3 * (common - low):
        high = common + 1.5 * (common - low)
    if from_zero:
        low = min(0.0, low)
    if not high > low:
        room = abs(high) or 1.0
        low, high = low - room / 2, high + room / 2
    return low, high, sum(y > high for y in ys)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    # Far outside of the picture one place is as good as another, and its digits stay few.
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
        (across(x), max(up(y), TOP), text)
        for (x, y), text in list(zip(curve.points, curve.texts, strict=False))[::every]
    ]
    return Line(curve.name, curve.colour, curve.dashed, width, " ".join(path), dots)
