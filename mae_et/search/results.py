"""What a search leaves: the curriculum as a config, a table, a chart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_et.config.files import to_yaml
from mae_et.io.atomic import write_text_atomically
from mae_et.monitoring.plots import Chart, save_charts
from mae_et.search.config import SearchConfig
from mae_et.search.found import Found
from mae_et.search.journal import Fact, Journal
from mae_et.training.plan import make_plan


def report(config: SearchConfig, images: int, found: Found, journal: Journal) -> dict[str, Any]:
    """Write what was found; return its figures.

    Raises:
        UserError: `curriculum.epochs` leaves a stage no step.
    """
    folder = config.output.dir
    facts = [fact for fact in journal.facts if "trial" in fact]
    run = config.run_of(found.stages, config.curriculum.epochs, folder / "run", found.shares_of)
    run = replace(run, output=replace(run.output, keep_every=config.output.keep_every))
    plan = make_plan(run, images)
    results = {
        "search": str(folder),
        "strategy": config.search.strategy,
        "objective": config.search.objective,
        "bandwidths": [stage.bandwidth for stage in found.stages],
        "magnitudes": [stage.magnitude for stage in found.stages],
        "value": found.value,
        "trial": found.trial,
        "trials": len(facts),
        "trials_without_score": sum(fact["value"] is None for fact in facts),
        "equivalent_epochs": round(sum(fact["equivalent_epochs"] for fact in facts), 2),
        "training_seconds": round(sum(fact["seconds"] for fact in facts), 1),
        "curriculum": str(folder / "curriculum.yaml"),
        "curriculum_equivalent_epochs": round(plan.equivalent_epochs, 2),
    }
    command = f"mae-et pretrain --config {folder / 'curriculum.yaml'}"
    head = (
        f"# Found by mae-et search ({config.search.strategy}, {len(facts)} trials of "
        f"{config.budget:g} epochs): {config.search.objective} {found.value:.2f} ({found.trial}).\n"
        f"# Command: {command}\n"
    )
    write_text_atomically(folder / "curriculum.yaml", head + to_yaml(run))
    write_text_atomically(folder / "results.md", table(facts, found))
    draw(folder / "search.png", config, facts, found)
    write_text_atomically(folder / "results.json", json.dumps(results | {"table": facts}, indent=1))
    return results


def table(facts: list[Fact], found: Found) -> str:
    """Return the trials as a Markdown table, in the order in which they were scored."""
    head = "| trial | bandwidths | images | equivalent epochs | training | score |"
    lines = [head, "|" + "---|" * 6]
    for fact in facts:
        bandwidths = ", ".join(str(bandwidth) for bandwidth in fact["bandwidths"])
        score = fact["failed"] if fact["value"] is None else f"{fact['value']:.2f}"
        name = f"**{fact['trial']}**" if fact["trial"] == found.trial else fact["trial"]
        lines.append(
            f"| {name} | {bandwidths} | {fact['images']:,} | {fact['equivalent_epochs']:.2f} | "
            f"{fact['seconds']:.0f} s | {score} |"
        )
    stages = ", ".join(str(stage.bandwidth) for stage in found.stages)
    return "\n".join([*lines, "", f"Found: {stages} (equal shares of {found.shares_of})", ""])


def draw(path: Path, config: SearchConfig, facts: list[Fact], found: Found) -> None:
    """Draw the scores of the trials, and the curriculum that was found."""
    scored = [fact for fact in facts if fact["value"] is not None]
    if config.search.strategy == "sequential":
        # The last of a trial's stages is its short training; the one before it was to be chosen.
        names = [*(f"B = {bandwidth}" for bandwidth in config.candidates), "chosen"]
        points: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
        for fact in scored:
            stage, bandwidth = len(fact["bandwidths"]) - 1, fact["bandwidths"][-2]
            chosen = bandwidth == found.stages[stage - 1].bandwidth
            for name in [f"B = {bandwidth}", *(["chosen"] if chosen else [])]:
                points[name][0].append(stage)
                points[name][1].append(fact["value"])
        scores = Chart("Candidates of each stage", "stage", config.search.objective, points,
                       dots=True)  # fmt: skip
    else:
        places = [float(place + 1) for place in range(len(scored))]
        values = [fact["value"] for fact in scored]
        best = [max(values[: place + 1]) for place in range(len(values))]
        scores = Chart("Trials", "trial", config.search.objective,
                       {"trial": (places, values), "best so far": (places, best)},
                       dots=True)  # fmt: skip
    edges = [place / len(found.stages) for place in range(len(found.stages) + 1)]
    sides = [float(stage.bandwidth) for stage in found.stages]
    staircase = {"found": (edges, [*sides, sides[-1]])}
    shown = Chart("Curriculum found", f"share of the {found.shares_of}", "bandwidth", staircase,
                  steps=True)  # fmt: skip
    save_charts(path, [scores, shown])
