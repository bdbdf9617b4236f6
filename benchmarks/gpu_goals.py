"""Compare what `benchmarks/gpu.sh` has measured so far with the goals for one H100 or H200.

    python -m mae_et.benchmarks.gpu_goals OUT                 # writes OUT/goals.md
    python -m mae_et.benchmarks.gpu_goals OUT VARIANT FOLDER  # first adds a run to OUT/run.json

Speeds and waits of a run exclude its first row at each bandwidth, in which blocks are compiled and
passes are captured.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mae_et.io.atomic import write_text_atomically
from mae_et.io.metrics_file import read_metrics

KEPT = ("step", "bandwidth", "window_steps", "window_seconds", "images_per_second",
        "data_time_fraction", "loss", "memory_gib")  # fmt: skip
LOADING = {96: 20_000, 160: 15_000, 224: 10_000}
"""Goals for the images/s of loading alone, by bandwidth."""
WAIT, AGAINST_CONSTANT, AGAINST_PLAIN, SMALL_STEPS, COMPILE_SECONDS = 0.02, 1.05, 2.0, 8000, 30

Figures = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Add a run, if one is given, and write the goals."""
    out = Path(arguments[0])
    if len(arguments) > 1:
        variant, folder = arguments[1], Path(arguments[2])
        write_text_atomically(
            out / "run.json", json.dumps(_read(out / "run.json") | {variant: run_figures(folder)})
        )
    node = _read(out / "node.json") or _read(out / "node.partial.json")
    log = out / "log.txt"
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    write_text_atomically(
        out / "goals.md", goals(_read(out / "run.json"), node, said, _outcomes(out))
    )


def run_figures(folder: Path) -> Figures:
    """Return the rows of a run, and whether it ended."""
    rows = [{key: row.get(key) for key in KEPT} for row in read_metrics(folder)]
    return {"ended": (folder / "results.json").exists(), "rows": rows}


def goals(runs: Figures, node: Figures, said: str, outcomes: Figures) -> str:
    """Return two Markdown tables: the goals, and the runs; between them, where images are decoded.

    The figures are of each variant's run and of `mae-et bench node`, whole or partial; `said` is
    the log of the commands, and `outcomes` the last outcome of each test, by name.
    """
    default = by_bandwidth(runs.get("default", {}))
    loading = _loading(said)
    waits = {b: wait for b, (_, wait) in default.items()}
    training = node.get("training", [])
    plain, compiled = (
        _fastest([row for row in training if row["bandwidth"] == 224 and kind(row)])
        for kind in (lambda row: row.get("reference"), lambda row: row["compiled"])
    )
    small = [row for row in training if (row["bandwidth"], row["micro_batch"]) == (96, 64)]
    compiling = _first(r"compiled for bandwidth (\d+) in ([\d.]+) s", said)
    compiled_for = {bandwidth for bandwidth, _ in compiling}
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    rows = [
        _row(
            "loading plain JPEGs, exact crop, alone, images/s at "
            + " / ".join(map(str, LOADING)),
            " / ".join(f"{goal:,}" for goal in LOADING.values()),
            [loading.get(b, loading.get(224)) for b in LOADING],
            lambda found: all(f >= goal for f, goal in zip(found, LOADING.values(), strict=True)),
        ),
        _row(
            "share of time waiting for data at " + " / ".join(map(str, waits or LOADING)),
            f"<= {WAIT}", list(waits.values()), lambda found: max(found) <= WAIT, ".2f",
            whole=len(waits) == len(LOADING),
        ),
        _row(
            "etpp against constant at equal compute, 512 images, if loading keeps up",
            f"<= {AGAINST_CONSTANT}", [node.get("time_against_constant")],
            lambda found: found[0] <= AGAINST_CONSTANT, ".2f",
        ),
        _row(
            "224 px, compiled, against the plain reference",
            f">= {AGAINST_PLAIN}", [compiled / plain if compiled and plain else None],
            lambda found: found[0] >= AGAINST_PLAIN, ".2f",
        ),
        _row(
            "96 px, 64 images a step, images/s", f">= {SMALL_STEPS:,}", [_fastest(small)],
            lambda found: found[0] >= SMALL_STEPS,
        ),
        _row(
            f"compilation at {len(compiled_for)} bandwidths, s (first run, empty cache)",
            f"<= {COMPILE_SECONDS}",
            [sum(float(seconds) for _, seconds in compiling) if compiling else None],
            lambda found: found[0] <= COMPILE_SECONDS, ".0f",
            whole=len(compiled_for) == len(LOADING),
        ),
        _row(
            f"tests that passed (of {len(outcomes)} that ran; failed: {', '.join(failed) or '-'})",
            "all", [passed if outcomes else None], lambda _: not failed,
        ),
    ]  # fmt: skip
    lines = ["| | goal | measured | met |", "|---|---|---|---|", *rows]
    lines += ["", *_first(r"images are (?:decoded|cropped) by .*", said)]
    lines += ["", "| run | bandwidth | images/s | wait for data | ended |", "|---|---|---|---|---|"]
    for variant, figures in runs.items():
        for bandwidth, (speed, wait) in by_bandwidth(figures).items():
            ended = "yes" if figures["ended"] else "no"
            lines.append(f"| {variant} | {bandwidth} | {speed:,.0f} | {wait:.2f} | {ended} |")
    return "\n".join(lines) + "\n"


def by_bandwidth(figures: Figures) -> dict[int, tuple[float, float]]:
    """Return images/s and the fraction of time spent waiting for data, by bandwidth."""
    seen: set[int] = set()
    sums: dict[int, list[float]] = {}
    for row in figures.get("rows", []):
        bandwidth, seconds = row["bandwidth"], row["window_seconds"]
        if bandwidth in seen:
            images, waited, total = sums.get(bandwidth, [0.0, 0.0, 0.0])
            sums[bandwidth] = [
                images + row["images_per_second"] * seconds,
                waited + row["data_time_fraction"] * seconds,
                total + seconds,
            ]
        seen.add(bandwidth)
    return {b: (images / total, waited / total) for b, (images, waited, total) in sums.items()}


def _row(
    goal: str, limit: str, found: Sequence[Any], met: Callable[[Any], bool], form: str = ",.0f",
    whole: bool = True,
) -> str:  # fmt: skip
    """Return a row; a goal that is met so far, without the `whole` of it, is not judged."""
    if not found or None in found:
        return f"| {goal} | {limit} | not measured | - |"
    shown = " / ".join(format(value, form) for value in found)
    judged = "**no**" if not met(found) else "yes" if whole else "-"
    return f"| {goal} | {limit} | {shown} | {judged} |"


def _loading(said: str) -> dict[int, float]:
    """Return the GPU's images/s by image side, as a run with `efficiency.decode auto` reports."""
    found = re.findall(r"([\d,]+) images/s at (\d+) px(?: \(.*?\))?, \d+ loader processes", said)
    return {int(side): float(speed.replace(",", "")) for speed, side in found}


def _first(pattern: str, said: str) -> list[Any]:
    """Return what the first run of the default variant whose output has a pattern printed of it."""
    runs = [each.partition("\n== ")[0] for each in said.split(".variants default ")[1:]]
    return next((found for run in runs if (found := re.findall(pattern, run))), [])


def _fastest(rows: Sequence[Figures]) -> float | None:
    return max((row["images_per_second"] for row in rows if row["images_per_second"]), default=None)


def _read(path: Path) -> Figures:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _outcomes(out: Path) -> Figures:
    """Return the last outcome of each test, by name."""
    path, found = out / "tests.jsonl", Figures()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # half-written
            row = json.loads(line)
            found[row["test"]] = row["outcome"]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
