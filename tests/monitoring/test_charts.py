"""Curves, axes, ticks and numbers of a report's charts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_et.monitoring.figures import short
from mae_et.monitoring.report.charts import FRAME, Band, Curve, chart, thinned, tick_label, ticks

NUMBERS = st.floats(-1e12, 1e12)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40))
def test_higher_values_are_drawn_higher_and_values_above_the_axis_are_counted(points) -> None:
    """Positions are read back from the path."""
    points = sorted(points)
    drawn = chart("t", "x", [Curve(0, points)])
    assert drawn is not None
    places = re.findall(r"[ML](-?[\d.e+]+),(-?[\d.e+]+)", drawn.lines[0].path)
    ys = [float(y) for _, y in places]
    values = [y for _, y in points]
    # One scale for all: equal values are equally high.
    for a, b, place_a, place_b in zip(values, values[1:], ys, ys[1:], strict=False):
        assert place_a >= place_b if a <= b else place_a <= place_b
    shown = [y for y in ys if FRAME.top <= y <= FRAME.bottom]
    cut = re.match(r"\d+", drawn.note)
    assert len(ys) - len(shown) == (int(cut.group()) if cut else 0)


def test_ticks_and_curves_share_one_scale() -> None:
    drawn = chart("t", "x", [Curve(0, [(0.0, 0.0), (10.0, 5.0), (20.0, 20.0)])])
    assert drawn is not None
    assert [label for _, label in drawn.y_ticks] == ["0", "5", "10", "15", "20"]
    assert [label for _, label in drawn.x_ticks] == ["0", "5", "10", "15", "20"]
    at = {label: place for place, label in drawn.y_ticks}
    along = {label: place for place, label in drawn.x_ticks}
    assert drawn.lines[0].path == (
        f"M{along['0']:g},{at['0']:g} L{along['10']:g},{at['5']:g} L{along['20']:g},{at['20']:g}"
    )


@given(NUMBERS, NUMBERS)
def test_ticks_are_round_numbers_within_the_axis(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-300):
        room = 1e-6 * (high - low)
        assert all(low - room <= value <= high + room for value in found)
        assert found == sorted(set(found))


@given(st.lists(NUMBERS, min_size=1, max_size=100))
def test_thinning_a_curve_keeps_its_extremes(values: list[float]) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept = thinned(points, 5)
    assert len(kept) <= 11
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    for choose in (min, max):
        assert choose(y for _, y in kept) == choose(values)
    assert kept[-1] == points[-1]


def test_bands_and_marks_share_the_axis_of_the_curve() -> None:
    curves = [Curve(0, [(0.0, 1.0), (4.0, 2.0)])]
    bands = [Band(0, 2, "16"), Band(2, 9, "32")]
    drawn = chart("t", "x", curves, bands, [(2.0, "spike")], from_zero=True)
    assert drawn is not None
    assert drawn.y_ticks[0] == (pytest.approx(FRAME.bottom), "0")
    (first, second), (mark,) = drawn.bands, drawn.marks
    middle = (first[0] + second[1]) / 2
    assert first[1] == second[0] == mark[0] == pytest.approx(middle)


@given(st.floats(1e-9, 1e20))
def test_tick_labels_fit_beside_the_axis(value: float) -> None:
    """Ticks are 1, 2 or 5 times a power of ten, or a multiple with as many digits."""
    for tick in ticks(0.0, value):
        assert len(tick_label(tick)) <= 6


def test_the_chart_says_how_far_values_exceed_its_axis() -> None:
    points = [(0.0, 1e9), *((float(x), 1 + x / 100) for x in range(1, 100))]
    drawn = chart("t", "x", [Curve(0, points)])
    assert drawn is not None
    assert drawn.note == "1 value above the axis, up to 1G"
    few = chart("t", "x", [Curve(0, [(0.0, 2.4), (1.0, 2.5), (2.0, 3.0)])])
    assert few is not None
    assert not few.note
    assert max(place for place, _ in drawn.y_ticks) <= FRAME.bottom


def test_numbers_are_short() -> None:
    assert [short(x) for x in (0, 0.5, 1234.5, 44096, 1e6, 3e-5, -2.5e12)] == [
        "0", "0.5", "1234", "44.1k", "1M", "3e-05", "-2.5T",
    ]  # fmt: skip
    assert short(1.573e12, "FLOPs") == "1.573 TFLOPs"
