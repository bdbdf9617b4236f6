"""Charts as PNG, by matplotlib, which the extra `search` installs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mae_et.io.atomic import write_atomically

Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """Axes with lines on them, a legend where there is more than one."""

    title: str
    across: str
    """Label of the horizontal axis."""
    up: str
    """Label of the vertical axis."""
    lines: Mapping[str, Points] = field(default_factory=dict)
    """Points that are joined, by their name."""
    steps: bool = False
    """Whether lines are stairs."""
    dots: bool = False
    """Whether points at whole numbers are not joined; the last line lies behind them."""
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Half the length of the error bar at each point of a line."""
    doublings: bool = False
    """Whether the horizontal axis is logarithmic, in powers of two."""


def save_charts(path: Path, charts: Sequence[Chart], rows: int = 1) -> bool:
    """Draw charts side by side, in rows, to a PNG; without matplotlib warn, and return False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, ScalarFormatter
    except ImportError:
        warnings.warn(
            f"{path.name} is not drawn: pip install '.[search]' (in the clone)", stacklevel=2
        )
        return False
    columns = -(-len(charts) // rows)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    for place, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set(title=chart.title, xlabel=chart.across, ylabel=chart.up)
        for number, (name, (x, y)) in enumerate(chart.lines.items()):
            behind = chart.dots and number == len(chart.lines) - 1
            axes.errorbar(
                x, y, yerr=chart.spread.get(name), label=name, capsize=3, markersize=4,
                zorder=1 if behind else 2,
                color="0.6" if behind else None, marker="" if chart.steps or behind else "o",
                linestyle="" if chart.dots and not behind else "-",
                drawstyle="steps-post" if chart.steps else None,
            )  # fmt: skip
        if chart.doublings:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        if chart.dots:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(chart.lines) > 1:
            axes.legend(fontsize="small")
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True
