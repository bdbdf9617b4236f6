"""Strategies find the known best curriculum, with scores in place of training."""

import json
from pathlib import Path

import pytest
from searches import STRATEGIES, pretend, stages_of

from mae_et import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.errors import Diverged, RunFailed
from mae_et.search import trials
from mae_et.search.driver import search
from mae_et.search.space import Space
from mae_et.training.plan import make_plan


def test_sequential_finds_the_best_stages_one_by_one(small) -> None:
    """For an objective that is a sum over stages, the best curriculum has each stage's best."""
    best = [16, 32, 24]

    def objective(folder: Path) -> float:
        stages = stages_of(folder)[:-1]  # without the brief training at full bandwidth
        return -sum(abs(a - b) for a, b in zip(stages, best, strict=False))

    found = search(small(), objective, pretend)
    assert found["bandwidths"] == best
    assert found["trials"] == 3 * 3


def test_greedy_finds_the_smallest_bandwidths_that_match_constant_bandwidth(small) -> None:
    """If the mean must be at least 26, the first stages of four can be at 24."""

    def objective(folder: Path) -> float:
        stages = stages_of(folder)
        return min(26.0, sum(stages) / len(stages))

    found = search(small("--search.strategy=greedy", "--search.stages=4"), objective, pretend)
    # Three stages: 24 reaches it (26), 16 does not (20). Two: 16 does not (16, 16, 24, 32: 22).
    assert found["bandwidths"] == [24, 24, 24, 32]
    config = load_config(PretrainConfig, [found["curriculum"]])
    assert config.curriculum.shares_of == "images"
    assert make_plan(config, 40).equivalent_epochs < 6
    kept = Path(found["search"], "trials").glob("*/checkpoints")
    assert [folder.parent.name for folder in kept] == ["B024-024-024-032"]


def test_greedy_accepts_scores_within_the_tolerance(small) -> None:
    def objective(folder: Path) -> float:
        return sum(stages_of(folder))

    flags = ["--search.strategy=greedy", "--search.tolerance=8"]
    assert search(small(*flags), objective, pretend)["bandwidths"] == [24, 32, 32]


def test_bayes_finds_a_known_optimum_with_non_decreasing_bandwidths(small) -> None:
    best = [16, 24, 24]

    def objective(folder: Path) -> float:
        return -sum(abs(a - b) for a, b in zip(stages_of(folder), best, strict=True))

    config = small("--search.strategy=bayes", "--search.trials=9", "--search.prune_from=null")
    found = search(config, objective, pretend)
    assert found["bandwidths"] == best
    for fact in json.loads((config.output.dir / "results.json").read_text())["table"]:
        assert fact["bandwidths"] == sorted(fact["bandwidths"])


def test_magnitudes_rise_from_zero_between_as_few_as_two_stages(small) -> None:
    flags = ["--search.candidates=[16,32]", "--search.stages=2", "--search.strategy=greedy"]
    config = small(*flags, "--data.augment=rand-mstd0.5", "--search.magnitude=7")
    stages = config.stages_of(config.candidates)
    assert [(each.bandwidth, each.magnitude) for each in stages] == [(16, 0), (32, 7)]


def test_the_nearest_untried_point_is_one_step_away_or_none_is_left(small) -> None:
    space = Space(small("--search.candidates=[16,32]", "--search.stages=2"), 40)
    points = [{"stage_1": first, "stage_2": last} for first, last in ((0, 0), (0, 1), (1, 1))]
    assert space.nearest(points[0], points[:1], 0) == points[1]  # stage 1 may not exceed stage 2
    assert space.nearest(points[0], points, 0) is None


@pytest.mark.slow
def test_bayes_searches_the_last_magnitude_if_data_are_augmented(small) -> None:
    def objective(folder: Path) -> float:
        return -abs(stages_of(folder, "magnitude")[-1] - 4)

    flags = ["--search.strategy=bayes", "--search.prune_from=null", "--search.trials=20"]
    found = search(small(*flags, "--data.augment=rand-mstd0.5"), objective, pretend)
    assert found["magnitudes"] == [0, 2, 4]


def test_bayes_prunes_trials_below_the_median(small) -> None:
    requested: list[tuple[str, int | None]] = []

    def watching(configs, stop_after_step=None):
        requested.extend((config.output.dir.name, stop_after_step) for config in configs)
        return pretend(configs, stop_after_step)

    def objective(folder: Path) -> float:
        return float(sum(stages_of(folder)))

    config = small("--search.strategy=bayes", "--search.trials=10", "--search.prune_from=0.5")
    found = search(config, objective, watching)
    table = json.loads((config.output.dir / "results.json").read_text())["table"]
    pruned = {fact["trial"] for fact in table if "pruned after stage" in (fact["failed"] or "")}
    assert pruned
    assert all(fact["equivalent_epochs"] < 5 for fact in table if fact["trial"] in pruned)
    assert not pruned & {name for name, until in requested if until is None}
    assert found["bandwidths"] == [32, 32, 32]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_diverging_trial_scores_worst_and_the_search_continues(small, strategy) -> None:
    def diverging(configs, stop_after_step=None):
        return ["the loss became nan" if "B016" in str(c.output.dir) else pretend([c])[0]
                for c in configs]  # fmt: skip

    config = small(f"--search.strategy={strategy}", "--search.trials=4")
    found = search(config, lambda folder: 1.0, diverging)
    assert 16 not in found["bandwidths"]
    assert "the loss became nan" in (config.output.dir / "results.md").read_text()


def test_divergence_is_a_score_and_other_failures_are_raised(small, monkeypatch) -> None:
    errors = iter([Diverged("the loss became nan"), RunFailed("disk full")])

    def train(config, stop_after_step):
        raise next(errors)

    monkeypatch.setattr(trials, "pretrain", train)
    runs = [small().pretraining]
    assert trials.run_here(runs) == ["the loss became nan"]
    with pytest.raises(RunFailed, match="disk full"):
        trials.run_here(runs)
