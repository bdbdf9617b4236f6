"""Figures of a run: their order, names and units, the time left, and a table for the terminal."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from mae_et.io.metrics_file import Row, is_plausible

Item = TypeVar("Item")
# Figures to compare, in the order of the columns.
FIGURES = (
    "loss", "val_loss", "top1", "top5", "best_top1", "raw_top1", "knn", "linear", "untrained_knn",
    "untrained_linear", "probe_knn", "probe_ridge", "probe_effective_rank",
    "equivalent_epochs", "images", "val_images", "probe_val_images", "training_seconds",
    "top1_standard_error", "knn_standard_error", "linear_standard_error",
)  # fmt: skip
NAMES = {
    "ridge": "linear (ridge)", "probe_knn": "kNN of the last probe",
    "probe_ridge": "linear (ridge) of the last probe",
    "probe_effective_rank": "effective rank of the last probe",
    "probe_time_fraction": "time of probes", "probe_seconds": "probe time",
    "data_time_fraction": "data wait", "val_loss": "validation loss",
    "raw_val_loss": "raw validation loss", "val_images": "validation images",
    "probe_val_images": "validation images of the last probe",
    "top1": "top-1", "top5": "top-5", "best_top1": "best top-1", "raw_top1": "raw top-1",
    "raw_top5": "raw top-5", "knn": "kNN", "untrained_knn": "kNN, untrained",
    "untrained_linear": "linear, untrained", "training_seconds": "training time",
}  # fmt: skip
PERCENTAGES = ("top1", "top5", "knn", "linear", "ridge")
NAMED = (
    "run", "data", "settings", "provenance", "features", "predictions", "shape", "projector",
    "image", "format", "output", "report", "dynamics", "by", "checkpoints", "search", "objective",
    "bandwidths", "value", "trials", "curriculum",
)  # fmt: skip
"""Inputs and outputs of a command, rather than figures."""
PROVENANCE = ("pool", "image_size", "train_images", "val_images", "precision", "weights")
"""Entries of a score's provenance that a terminal shows; the file has all."""
POINTS = 5
"""Maximum number of points of a curve in a line of text."""
# Counts of faults, shown only if there were any.
FAULTS = ("diverged", "loss_spikes", "skipped_updates", "unreadable_images", "substituted")
PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def ordered_figures(keys: set[str]) -> list[str]:
    """Sort figures as in `FIGURES`, those of inner runs (`finetune top1`) last."""
    return sorted(keys, key=lambda key: (" " in key, FIGURES.index(key.split(" ")[-1]), key))


def is_error(key: str) -> bool:
    """Return whether a figure is the standard error of another, which shows it where it fits."""
    return key.endswith("_standard_error")


def figure_name(key: str) -> str:
    """Return the name of a figure in words: `finetune best_top1` is `finetune best top-1`."""
    *inner, name = key.split(" ")
    return " ".join([*inner, NAMES.get(name, name.replace("_", " "))])


def format_figure(key: str, value: Any, images: int | None = None) -> str:
    """Format a figure with its unit, or what a score was computed from in some words.

    An accuracy gets its standard error if the number of images that it was measured on is given.
    """
    if value is None:
        return ""
    if key == "provenance" and isinstance(value, dict):
        return ", ".join(f"{name} {value[name]}" for name in PROVENANCE if name in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_plausible(value):  # text, or damage
        return str(value)
    if key.endswith("seconds"):
        return format_seconds(value)
    if key.endswith("fraction"):
        return f"{value:.2%}"
    if key.endswith(PERCENTAGES):
        error = f" ± {standard_error(value, images):.2g}" if images else ""
        return f"{value:.4g}{error} %"
    if isinstance(value, int):
        return f"{value:,}"
    return short(value) if abs(value) >= 1e6 else f"{value:.5g}"


def standard_error(accuracy: float, images: int) -> float:
    """Return the standard error, in points, of an accuracy in percent.

    As Agresti and Coull (1998), with two more images that are correct and two that are not: it is
    not 0 where all or none of a few images are correct.
    """
    share = (min(100.0, max(0.0, accuracy)) / 100 * images + 2) / (images + 4)
    return 100 * math.sqrt(share * (1 - share) / (images + 4))


def short(value: float, unit: str = "") -> str:
    """Format a number briefly: 12k, 1.5M, 0.0012, 3e-05, and with a unit 1.5 TFLOPs."""
    for one, prefix in PREFIXES:
        if abs(value) >= max(one * 0.99995, 1e4 - 0.5):
            return f"{value / one:.4g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.4g} {unit}".strip()


def seconds_left(row: Row) -> float:
    """Estimate the remaining seconds after a row of metrics, from its compute per second."""
    return row["seconds"] / max(row["compute"], 1e-9) * (1 - row["compute"])


def format_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def results_table(results: dict[str, Any]) -> str:
    """Return the results of a command as lines for a terminal: figures, faults, and stages."""
    shown = [key for key in results if key in NAMED]
    shown += [key for key in ordered_figures(results.keys() & set(FIGURES)) if not is_error(key)]
    shown += [key for key in ("probe_time_fraction", *FAULTS) if results.get(key)]
    rows = {figure_name(k): format_figure_of(results, k) for k in shown}
    rows |= dict(_nested(results))
    width = max(map(len, rows), default=0)
    lines = [f"{name:<{width}}  {figure}" for name, figure in rows.items()]
    stages = results.get("stages")
    if isinstance(stages, list) and len(stages) > 1:
        lines += ["", *_stages(stages)]
    probes = results.get("probes")
    if isinstance(probes, list) and probes:
        lines += ["", probe_curve(probes)]
    return "\n".join(lines)


def format_figure_of(results: dict[str, Any], key: str) -> str:
    """Format one of several figures, an accuracy with its standard error if that is known."""
    return format_figure(key, results.get(key), images_of(key, results))


def images_of(key: str, results: dict[str, Any]) -> int | None:
    """Return the number of images that an accuracy was measured on, if it is recorded."""
    *inner, name = key.split(" ")
    if name.startswith("probe_"):
        return results.get(" ".join([*inner, "probe_val_images"]))
    provenance = results.get("provenance")
    found = provenance.get("val_images") if isinstance(provenance, dict) else None
    return results.get(" ".join([*inner, "val_images"])) if found is None else found


def _nested(results: dict[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the figures of mappings inside results, such as `train bytes at 112`, by size."""
    for key, value in results.items():
        inner = f"{name} {'at ' * key.isdigit()}{key}".strip()
        if isinstance(value, dict) and key not in NAMED:
            yield from _nested(value, inner)
        elif name:
            yield inner, format_figure(key, value)


def probe_curve(probes: Sequence[dict[str, Any]]) -> str:
    """Return the curve of a run's probes, kNN or else effective rank, as one line of text.

    `probes` has the measures of each, and the share of compute done as `compute`.
    """
    key, name = ("knn", "kNN") if "knn" in probes[0] else ("effective_rank", "rank")
    points = []
    for probe in spread(probes, POINTS):
        value = "non-finite" if probe.get(key) is None else f"{probe[key]:.3g}"
        points.append(f"{value} at {probe['compute']:.0%}")
    return f"{name} by compute: {', '.join(points)}"


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items (2 or more), evenly spaced, with the first and the last."""
    last = len(items) - 1
    places = {round(place * last / (most - 1)) for place in range(most)} if items else set()
    return [items[place] for place in sorted(places)]


def _stages(stages: Sequence[dict[str, Any]]) -> list[str]:
    keys = ("bandwidth", "images", "loss", "images_per_second", "data_time_fraction")
    rows = [("stage", *(figure_name(key) for key in keys))]
    for place, stage in enumerate(stages, 1):
        rows.append((str(place), *(format_figure(key, stage.get(key)) for key in keys)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
