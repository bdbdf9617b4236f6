"""Charts of a report: curves of all runs of one kind on the same axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mae_et.io.metrics_file import Row
from mae_et.monitoring.figures import short
from mae_et.monitoring.report.charts import Band, Curve, SvgChart, chart
from mae_et.monitoring.report.records import ReportedRun

PROBES = {
    "knn": "Probe: kNN (%)", "ridge": "Probe: linear (%)",
    "effective_rank": "Probe: effective rank",
}  # fmt: skip
Position = Callable[[ReportedRun, float], float | None]


@dataclass(frozen=True)
class Axis:
    """The x axis of a chart."""

    label: str
    place: Position
    """Maps a run and a step to the position on the axis."""


@dataclass(frozen=True)
class Group:
    """The charts of pre-training runs, or of classifiers."""

    title: str
    records: list[ReportedRun]
    notes: list[str]
    charts: list[SvgChart]


def groups_of(records: Sequence[ReportedRun]) -> list[Group]:
    """Return the charts of the pre-training runs and of the classifiers."""
    kinds = {
        "Pre-training": [record for record in records if not record.is_classifier],
        "Classifiers": [record for record in records if record.is_classifier],
    }
    return [_group(title, found) for title, found in kinds.items() if found]


def _group(title: str, records: list[ReportedRun]) -> Group:
    compute, images = _compute(records), Axis("images seen", ReportedRun.images)
    axes = {"compute": compute, "images": images, "time": _clock(records)}
    draw = _Drawing(records)
    charts: list[SvgChart | None] = []
    if any(record.scores for record in records):
        charts += [draw.scores(f"Validation top-1 (%) by {by}", axes[by], "top1") for by in axes]
        charts += [
            draw.scores("Validation top-5 (%)", compute, "top5"),
            draw.scores("Validation loss", compute, "val_loss"),
        ]
    for place, (key, measure) in enumerate(draw.probes().items()):
        shown = axes if place == 0 else ["compute"]
        charts += [draw.scores(f"{measure} by {by}", axes[by], key) for by in shown]
    charts += [
        draw.rows(f"Training loss by {by}", axes[by], "loss")
        for by in ("compute", "time", "images")
    ]
    charts += [
        draw.bandwidths(compute) if len(records) > 1 else None,
        draw.rows("Learning rate", compute, "lr", from_zero=True),
        draw.rows("Gradient norm", compute, "grad_norm"),
        draw.rows("Images per second", compute, "images_per_second", from_zero=True),
        draw.rows(
            "Time spent waiting for data (%)", compute, "data_time_fraction", 100, from_zero=True
        ),
    ]
    return Group(title, records, _notes(records), [each for each in charts if each is not None])


def _notes(records: list[ReportedRun]) -> list[str]:
    notes = []
    if any(len({s.bandwidth for s in r.plan.stages}) > 1 for r in records if r.plan):
        notes.append(
            "The training loss is measured at the bandwidth of the stage, so it steps when the "
            "bandwidth changes. Compare runs at equal bandwidth, preferably at their ends."
        )
    targets = {str(record.settings.get("model.target")) for record in records}
    if len(targets) > 1:
        notes.append(
            f"Losses of different targets ({', '.join(sorted(targets))}) cannot be compared."
        )
    return notes


def _compute(records: list[ReportedRun]) -> Axis:
    """Measure compute in equivalent epochs if they are the same unit in all runs."""
    plans = [record.plan for record in records if record.plan]
    epochs = len({(plan.base_cost, plan.dataset_size) for plan in plans}) <= 1
    units = {record.unit for record in records}
    if epochs or len(units) > 1:
        return Axis("compute, in equivalent epochs", ReportedRun.epochs)
    return Axis(f"compute, in {units.pop()}", ReportedRun.compute)


def _clock(records: list[ReportedRun]) -> Axis:
    longest = max((record.seconds(record.step) or 0.0 for record in records), default=0.0)
    unit, size = next(
        (unit, size)
        for unit, size in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        if longest >= 2 * size or size == 1.0
    )

    def place(record: ReportedRun, step: float) -> float | None:
        seconds = record.seconds(step)
        return None if seconds is None else seconds / size

    return Axis(f"training time, in {unit}", place)


@dataclass(frozen=True)
class _Drawing:
    """Draw runs on the same axes."""

    records: list[ReportedRun]

    def rows(
        self, title: str, axis: Axis, key: str, factor: float = 1.0, from_zero: bool = False
    ) -> SvgChart | None:
        """Draw a metric; mark the spikes of losses."""
        curves = [self._curve(r, r.rows, axis, key, factor) for r in self.records]
        marks = _spikes(self.records, axis) if key == "loss" else []
        return self._chart(title, axis, curves, marks=marks, from_zero=from_zero)

    def scores(self, title: str, axis: Axis, key: str) -> SvgChart | None:
        """Draw a validation score; dashed without the moving average, if one is kept."""
        curves = [self._curve(r, r.scores, axis, key) for r in self.records]
        raw = [self._curve(r, r.scores, axis, f"raw_{key}", dashed=True) for r in self.records]
        note = "Dashed: without the moving average of the weights"
        any_raw = any(curve.points for curve in raw)
        return self._chart(title, axis, [*curves, *raw], note=note if any_raw else "")

    def probes(self) -> dict[str, str]:
        """Return the measures of the probes and their titles, the most informative first."""
        rows = [row for record in self.records for row in record.scores]
        return {key: title for key, title in PROBES.items() if any(key in row for row in rows)}

    def bandwidths(self, axis: Axis) -> SvgChart | None:
        """Draw the complete curricula."""
        curves = []
        for record in self.records:
            stages = record.plan.stages if record.plan else ()
            edges = [(float(s.start), s.bandwidth) for s in stages]
            if stages:
                edges.append((float(stages[-1].start + stages[-1].steps), stages[-1].bandwidth))
            places = [(axis.place(record, step), float(width)) for step, width in edges]
            points = [(x, y) for x, y in places if x is not None]
            curves.append(Curve(record.colour, points))
        return chart("Bandwidth", axis.label, curves, from_zero=True, stairs=True)

    def _curve(
        self,
        record: ReportedRun,
        rows: list[Row],
        axis: Axis,
        key: str,
        factor: float = 1.0,
        dashed: bool = False,
    ) -> Curve:
        points, texts = [], []
        for row in rows:
            x, y = axis.place(record, row["step"]), row.get(key)
            if x is not None and y is not None:
                points.append((x, factor * y))
                name = f"{record.name}, " if len(self.records) > 1 else ""
                texts.append(f"{name}step {row['step']:,}: {short(factor * y)}")
        return Curve(record.colour, points, dashed, texts)

    def _chart(self, title: str, axis: Axis, curves: list[Curve], **more: Any) -> SvgChart | None:
        bands = _bands(self.records[0], axis) if len(self.records) == 1 else []
        return chart(title, axis.label, curves, bands, **more)


def _spikes(records: list[ReportedRun], axis: Axis) -> list[tuple[float, str]]:
    """Return the positions of rows marked as loss spikes during training."""
    marks = []
    for record in records:
        for row in record.rows:
            place = axis.place(record, row["step"])
            if row.get("spike") is True and place is not None:
                marks.append((place, f"{record.name}: loss spike before step {row['step']:,}"))
    return marks


def _bands(record: ReportedRun, axis: Axis) -> list[Band]:
    """Return the intervals of equal bandwidth on an axis, up to the last step done."""
    bands: list[Band] = []
    for stage in record.plan.stages if record.plan else ():
        start = axis.place(record, stage.start) or 0.0
        end = axis.place(record, min(stage.start + stage.steps, record.step))
        if end is None or stage.start >= record.step:
            break
        if bands and bands[-1].label == str(stage.bandwidth):
            bands[-1] = Band(bands[-1].start, end, bands[-1].label)
        else:
            bands.append(Band(start, end, str(stage.bandwidth)))
    return bands if len(bands) > 1 else []
