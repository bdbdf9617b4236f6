"""Write the results of a search: the curriculum as a config, a table of trials, a chart."""

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mae_et.config.files import to_yaml
from mae_et.io.atomic import write_text_atomically
from mae_et.monitoring.plots import Plot, save_plots
from mae_et.monitoring.tables import markdown_table
from mae_et.search.config import SearchConfig
from mae_et.search.trial_log import Record, TrialLog
from mae_et.search.trials import SearchResult
from mae_et.training.plan import make_plan


def write_search_results(
    config: SearchConfig, images: int, best: SearchResult, log: TrialLog
) -> dict[str, Any]:
    """Write the output files and return the figures."""
    folder = config.output.dir
    records = [record for record in log.records if "trial" in record]
    shares_of = best.trial.config.curriculum.shares_of
    run = config.run_of(best.stages, config.curriculum.epochs, folder / "run", shares_of)
    run = replace(run, output=replace(run.output, keep_every=config.output.keep_every))
    plan = make_plan(run, images)
    results = {
        "search": str(folder),
        "strategy": config.search.strategy,
        "objective": config.search.objective,
        "bandwidths": [stage.bandwidth for stage in best.stages],
        "magnitudes": [stage.magnitude for stage in best.stages],
        "value": best.value,
        "trial": best.trial.name,
        "trials": len(records),
        "trials_without_score": sum(record["value"] is None for record in records),
        "equivalent_epochs": round(sum(record["equivalent_epochs"] for record in records), 2),
        "training_seconds": round(sum(record["seconds"] for record in records), 1),
        "curriculum": str(folder / "curriculum.yaml"),
        "curriculum_equivalent_epochs": round(plan.equivalent_epochs, 2),
    }
    command = f"mae-et pretrain --config {folder / 'curriculum.yaml'}"
    head = (
        f"# Found by mae-et search ({config.search.strategy}, {len(records)} trials of "
        f"{config.budget:g} epochs): {config.search.objective} {best.value:.2f} "
        f"({best.trial.name}).\n"
        f"# Command: {command}\n"
    )
    write_text_atomically(folder / "curriculum.yaml", head + to_yaml(run))
    write_text_atomically(folder / "results.md", table(records, best))
    draw(folder / "search.png", config, records, best)
    write_text_atomically(
        folder / "results.json", json.dumps(results | {"table": records}, indent=1)
    )
    return results


def table(records: list[Record], best: SearchResult) -> str:
    """Return the trials as a Markdown table, in order of scoring."""
    head = ["trial", "bandwidths", "images", "equivalent epochs", "training", "score"]
    rows = [
        [
            f"**{record['trial']}**" if record["trial"] == best.trial.name else record["trial"],
            ", ".join(map(str, record["bandwidths"])),
            f"{record['images']:,}",
            f"{record['equivalent_epochs']:.2f}",
            f"{record['seconds']:.0f} s",
            record["failed"] if record["value"] is None else f"{record['value']:.2f}",
        ]
        for record in records
    ]
    stages = ", ".join(str(stage.bandwidth) for stage in best.stages)
    found = f"Best: {stages} (equal shares of {best.trial.config.curriculum.shares_of})"
    return f"{markdown_table(head, rows)}\n\n{found}\n"


def draw(path: Path, config: SearchConfig, records: list[Record], best: SearchResult) -> None:
    """Draw the scores of the trials and the best curriculum."""
    scored = [record for record in records if record["value"] is not None]
    sequential = config.search.strategy == "sequential"
    scores = _candidates(config, scored, best) if sequential else _trials(config, scored)
    edges = [place / len(best.stages) for place in range(len(best.stages) + 1)]
    sides = [float(stage.bandwidth) for stage in best.stages]
    staircase = {"best": (edges, [*sides, sides[-1]])}
    across = f"share of the {best.trial.config.curriculum.shares_of}"
    curriculum = Plot("Best curriculum", across, "bandwidth", staircase, steps=True)
    save_plots(path, [scores, curriculum])


def _candidates(config: SearchConfig, scored: list[Record], best: SearchResult) -> Plot:
    """Plot the score of each candidate of a stage, and connect the chosen ones."""
    names = [*(f"B = {bandwidth}" for bandwidth in config.candidates), "chosen"]
    points: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for record in scored:
        # The last stage of a trial is its brief training at full bandwidth.
        stage, bandwidth = len(record["bandwidths"]) - 1, record["bandwidths"][-2]
        chosen = bandwidth == best.stages[stage - 1].bandwidth
        for name in [f"B = {bandwidth}", *(["chosen"] if chosen else [])]:
            points[name][0].append(stage)
            points[name][1].append(record["value"])
    return Plot("Candidates of each stage", "stage", config.search.objective, points, dots=True)


def _trials(config: SearchConfig, scored: list[Record]) -> Plot:
    """Plot the scores in order, and the best so far."""
    places = [float(place + 1) for place in range(len(scored))]
    values = [record["value"] for record in scored]
    lines = {"trial": (places, values), "best so far": (places, list(accumulate(values, max)))}
    return Plot("Trials", "trial", config.search.objective, lines, dots=True)
