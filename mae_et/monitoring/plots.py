"""Draw plots as PNG with matplotlib, which the extra `search` installs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mae_et.io.atomic import write_atomically

Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Plot:
    """Lines over one pair of axes, with a legend if there are several."""

    title: str
    across: str
    """Label of the horizontal axis."""
    up: str
    """Label of the vertical axis."""
    lines: Mapping[str, Points] = field(default_factory=dict)
    """Points (x, y) of each line, by its name."""
    steps: bool = False
    """Whether to draw step functions."""
    dots: bool = False
    """Whether lines are unconnected points at integers, drawn over the last, a connected line."""
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Half length of the error bar at each point, by the name of the line."""
    doublings: bool = False
    """Whether the horizontal axis is logarithmic (base 2)."""


def save_plots(path: Path, plots: Sequence[Plot], rows: int = 1) -> bool:
    """Draw plots in a grid to a PNG; without matplotlib, warn and return False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, ScalarFormatter
    except ImportError:
        warnings.warn(
            f"{path.name} is not drawn: pip install '.[search]' (in the clone)", stacklevel=2
        )
        return False
    columns = -(-len(plots) // rows)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    for place, plot in enumerate(plots):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set(title=plot.title, xlabel=plot.across, ylabel=plot.up)
        for number, (name, (x, y)) in enumerate(plot.lines.items()):
            behind = plot.dots and number == len(plot.lines) - 1
            axes.errorbar(
                x, y, yerr=plot.spread.get(name), label=name, capsize=3, markersize=4,
                zorder=1 if behind else 2,
                color="0.6" if behind else None, marker="" if plot.steps or behind else "o",
                linestyle="" if plot.dots and not behind else "-",
                drawstyle="steps-post" if plot.steps else None,
            )  # fmt: skip
        if plot.doublings:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        if plot.dots:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(plot.lines) > 1:
            axes.legend(fontsize="small")
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True
