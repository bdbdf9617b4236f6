"""Searches from the command line to their curriculum, interrupted and on clusters."""

import contextlib
import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from searches import SMALL, STRATEGIES, pretend, stages_of
from slurm_cluster import Cluster
from torch.optim.optimizer import register_optimizer_step_post_hook

from mae_et import Interrupted, load_config
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.cli.main import main
from mae_et.config.schema import PretrainConfig
from mae_et.search.driver import search
from mae_et.training.plan import make_plan
from slurm.events import read_events


def weight_sum(folder: Path) -> float:
    """Score a run by a deterministic function of its weights."""
    state = newest_checkpoint(folder / "checkpoints")["model"]
    return sum(float(weight.double().abs().sum()) for weight in state.values()) % 10


def figures(found: dict) -> dict:
    """Return the figures of a search that do not depend on where and when it ran."""
    same = ("bandwidths", "value", "trial", "trials", "equivalent_epochs")
    return {key: found[key] for key in same}


@pytest.mark.parametrize(
    "strategy", [STRATEGIES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES[1:])]
)
def test_a_search_interrupted_between_all_its_steps_scores_each_trial_once(
    small, tmp_path: Path, strategy: str
) -> None:
    """Before a run, after it, before its score: the log equals that of an uninterrupted search."""
    flags = [f"--search.strategy={strategy}", "--search.trials=8", "--search.prune_from=0.5"]
    turns = itertools.count()
    interrupting = False

    def maybe_interrupt() -> None:
        if interrupting and next(turns) % 5 == 0:
            raise KeyboardInterrupt

    def running(configs, stop_after_step=None):
        maybe_interrupt()
        done = pretend(configs, stop_after_step)
        maybe_interrupt()
        return done

    def objective(folder: Path) -> float:
        maybe_interrupt()
        return (7 * sum(place * b for place, b in enumerate(stages_of(folder), 1)) % 31) / 3

    expected = search(small(*flags, f"--output.dir={tmp_path / 'whole'}"), objective, running)
    interrupting, found = True, None
    while found is None:
        with contextlib.suppress(KeyboardInterrupt):
            found = search(small(*flags), objective, running)
    assert next(turns) > expected["trials"]
    assert figures(found) == figures(expected)
    logs = [Path(each["search"], "trials.jsonl").read_text() for each in (found, expected)]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_stopped_by_signals_finds_the_same_curriculum(
    small, tmp_path: Path, strategy: str
) -> None:
    """Signals in the middle of trials and between them: the same scores, each computed once."""
    flags = [f"--search.strategy={strategy}", "--search.trials=4", "--search.stages=2",
             "--curriculum.epochs=4"]  # fmt: skip
    expected = search(small(*flags, f"--output.dir={tmp_path / 'whole'}"), weight_sum)

    stopped = small(*flags)
    calls = itertools.count()

    def strike(*_) -> None:
        if next(calls) % 17 == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    scored: list[Path] = []

    def objective(folder: Path) -> float:
        scored.append(folder)
        if len(scored) % 3 == 2:
            raise KeyboardInterrupt
        return weight_sum(folder)

    found, starts = None, 0
    hook = register_optimizer_step_post_hook(strike)
    try:
        while found is None:
            starts += 1
            assert starts < 60
            with contextlib.suppress(Interrupted, KeyboardInterrupt):
                found = search(stopped, objective)
    finally:
        hook.remove()
    assert starts > 3
    assert figures(found) == figures(expected)
    tables = [json.loads((folder / "results.json").read_text())["table"]
              for folder in (tmp_path / "whole", stopped.output.dir)]  # fmt: skip
    for fact in itertools.chain(*tables):
        fact.pop("seconds")
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    "strategy", ["bayes", *(pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES[:2])]
)
def test_the_resulting_curriculum_is_a_pretraining_config(
    tiny_yaml: Path, tmp_path: Path, strategy: str, capsys
) -> None:
    """On the command line, scored by kNN on held-out training images."""
    folder = tmp_path / "search"
    flags = [f"--config={tiny_yaml}", f"--output.dir={folder}", *SMALL, "--search.stages=2",
             "--curriculum.epochs=3", "--search.trials=2", "--search.candidates=[16,32]",
             f"--search.strategy={strategy}",
             "--search.held_out=0.3"]  # fmt: skip
    assert main(["search", *flags]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= results["value"] <= 100
    config = load_config(PretrainConfig, [results["curriculum"]])
    assert [s.bandwidth for s in config.curriculum.stages] == results["bandwidths"]
    make_plan(config, 40)
    assert {"results.json", "results.md", "search.png", "trials.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    # A finished search trains nothing and returns the same.
    begun = sorted(path.stat().st_mtime_ns for path in (folder / "trials").rglob("*"))
    assert main(["search", *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert begun == sorted(path.stat().st_mtime_ns for path in (folder / "trials").rglob("*"))
    if strategy == "bayes":
        assert main(["search", *flags, "--search.trials=3"]) == 0
        assert main(["pretrain", f"--config={results['curriculum']}"]) == 0


@pytest.mark.slow
def test_trials_run_as_jobs_of_a_cluster(tiny_yaml: Path, tmp_path: Path, capsys) -> None:
    """Local processes replace the cluster; the result equals that of one process."""
    found = []
    for cluster in ([], ["--search.cluster=local"]):
        folder = tmp_path / f"search{len(cluster)}"
        flags = [*SMALL, "--search.stages=2", "--search.held_out=0.3", *cluster]
        command = ["search", f"--config={tiny_yaml}", *flags, f"--output.dir={folder}"]
        assert main(command) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert figures(found[0]) == figures(found[1])


@pytest.mark.slow
def test_trials_run_as_a_slurm_array(
    cluster: Cluster, tiny_yaml: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """On a real SLURM; a search stopped while waiting finds its jobs again."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    (tmp_path / "here.yaml").write_text("{partition: main, cpus_per_task: 1, time: '30'}")
    folder = tmp_path / "search"
    flags = [*SMALL, "--search.stages=2", "--search.strategy=bayes", "--search.trials=4",
             "--search.at_once=3", "--search.held_out=0.3",
             f"--search.cluster={tmp_path / 'here.yaml'}"]  # fmt: skip
    command = ["search", f"--config={tiny_yaml}", *flags, f"--output.dir={folder}"]

    def interrupted(_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupted)
        assert main(command) == 130
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trials"] == 4
    for trial in (folder / "trials").iterdir():
        events = [event["event"] for event in read_events(trial)]
        assert events.count("submitted") == 1
        assert events[-1] == "finished"


def test_curriculum_yaml_has_every_section(small) -> None:
    found = search(small(), lambda folder: 1.0, pretend)
    text = Path(found["curriculum"]).read_text()
    assert text.startswith("# Found by mae-et search (sequential, 9 trials")
    assert set(yaml.safe_load(text)) == {
        "model", "init", "branch_from", "data", "curriculum", "crop", "optim", "efficiency",
        "probe", "output", "seed",
    }  # fmt: skip
    assert yaml.safe_load(text)["optim"]["decay_fraction"] is None
