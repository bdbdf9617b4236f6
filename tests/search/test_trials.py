"""Trials: equal compute, forked checkpoints, and the runs behind them."""

import json
from pathlib import Path

import pytest
import torch

from mae_et import load_config, pretrain
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.schedule import Curriculum
from mae_et.search.config import PAPER_BANDWIDTHS, SearchConfig
from mae_et.search.sequential import stage_trial
from mae_et.search.trial_log import TrialLog
from mae_et.search.trials import Trials, fork_checkpoint, run_here


def test_all_candidates_of_a_stage_have_equal_compute_within_a_step(small) -> None:
    config = small("--data.synthetic_train=400", "--curriculum.epochs=30")
    trials, parent = [], None
    for chosen in ([], [24], [24, 16]):
        trials = [stage_trial(config, 400, chosen, b, parent) for b in config.candidates]
        one = trials[0].plan
        step = one.base_cost * one.batch_size
        assert max(t.plan.compute for t in trials) - min(t.plan.compute for t in trials) <= step
        parent = trials[len(chosen) and 0 if chosen == [24] else 1]
    whole = Curriculum(config.stages_of([16, 24, 32]), 32, 8).plan(30, 400, 12)
    other = Curriculum(config.stages_of([32, 32, 32]), 32, 8).plan(30, 400, 12)
    assert abs(whole.compute - other.compute) <= 32 * 32 * 12


def test_a_forked_trial_equals_an_uninterrupted_run_of_its_stages(small, tmp_path: Path) -> None:
    """Up to rounding of the schedule."""
    config = small()
    trials = Trials(TrialLog(tmp_path / "trials.jsonl"), lambda folder: 0.0, run_here)
    first = stage_trial(config, 40, [], 24, None)
    second = stage_trial(config, 40, [24], 16, first)
    trials.scores([first])
    trials.scores([second])
    folder = tmp_path / "whole"
    whole = load_config(PretrainConfig, [second.folder / "config.yaml"],
                        [f"--output.dir={folder}"])  # fmt: skip
    pretrain(whole)
    expected = newest_checkpoint(folder / "checkpoints")
    found = newest_checkpoint(second.folder / "checkpoints")
    assert expected["step"] == found["step"] == second.plan.steps
    for name, weight in expected["model"].items():
        torch.testing.assert_close(found["model"][name], weight, rtol=1e-3, atol=2e-4)
    rows = (second.folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert sum(json.loads(row)["window_steps"] for row in rows) == second.plan.steps


def test_a_trial_keeps_replay_only_for_its_own_bandwidths(small) -> None:
    config = small("--data.replay={16: 2, 24: 3}")
    assert stage_trial(config, 40, [], 16, None).config.data.replay == {16: 2}
    assert stage_trial(config, 40, [], 32, None).config.data.replay is None


def test_default_candidates_scale_to_the_base_size_and_the_patch() -> None:
    assert SearchConfig().candidates == PAPER_BANDWIDTHS
    small = load_config(SearchConfig, [], ["--model.image_size=64", "--model.patch_size=8"])
    assert small.candidates == (32, 40, 48, 56, 64)


def test_a_fork_needs_its_starting_checkpoint(small) -> None:
    config = small()
    first = stage_trial(config, 40, [], 24, None)
    second = stage_trial(config, 40, [24], 16, first)
    with pytest.raises(Exception, match="the search cannot resume from"):
        fork_checkpoint(second)
