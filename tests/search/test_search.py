"""Curriculum searches: results, cost of trials, and resumption after interruptions."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from flipped import flipped
from slurm_cluster import Cluster
from torch.optim.optimizer import register_optimizer_step_post_hook

from mae_et import Interrupted, UserError, load_config, pretrain
from mae_et.checkpoints.store import newest_checkpoint, save_checkpoint
from mae_et.cli.main import main
from mae_et.config.files import to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.schedule import Curriculum
from mae_et.errors import Diverged, RunFailed
from mae_et.search import SearchConfig, search
from mae_et.search.config import PAPER_BANDWIDTHS
from mae_et.search.driver import check_same_images
from mae_et.search.sequential import stage_trial
from mae_et.search.trial_log import TrialLog, truncate_partial_line
from mae_et.search.trials import Trials, fork_checkpoint, run_here
from mae_et.training.plan import make_plan
from slurm.events import read_events

STRATEGIES = ("sequential", "greedy", "bayes")
SMALL = (
    "--curriculum.preset=etpp", "--curriculum.stages=[]", "--curriculum.epochs=6",
    "--curriculum.cost=area", "--search.candidates=[16,24,32]", "--search.stages=3",
    "--search.trials=6", "--search.finetune=0.2", "--optim.base_lr=0.005",
    "--output.reconstruct_images=0", "--output.tensorboard=false",
)  # fmt: skip


@pytest.fixture
def small(tiny_yaml: Path, tmp_path: Path):
    """Return a function that builds a search of seconds, with flags on top."""

    def build(*flags: str) -> SearchConfig:
        given = [f"--output.dir={tmp_path / 'search'}", *SMALL, *flags]
        return load_config(SearchConfig, [tiny_yaml], given)

    return build


def pretend(configs: Sequence[PretrainConfig], stop_after_step: int | None = None) -> list[None]:
    """Write the files of each run that a search reads, without training."""
    for config in configs:
        folder, step = config.output.dir, stop_after_step or config.output.keep_every or 1
        state = {"model": {}, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}
        state |= {"step": step, "seconds": 0}
        save_checkpoint(folder / "checkpoints", state, to_yaml(config), {})
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "metrics.jsonl").touch()
    return [None for _ in configs]


def stages_of(folder: Path, what: str = "bandwidth") -> list[int]:
    """Return the bandwidths (or magnitudes) of a trial's curriculum."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return [stage[what] for stage in config["curriculum"]["stages"]]


# --- results --------------------------------------------------------------------------------------


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


def test_divergence_is_a_score_and_other_failures_are_raised(small) -> None:
    def failing_with(error: Exception):
        def train(config, stop_after_step):
            raise error

        return train

    runs = [small().pretraining]
    assert run_here(runs, train=failing_with(Diverged("the loss became nan"))) == [
        "the loss became nan"
    ]
    with pytest.raises(RunFailed, match="disk full"):
        run_here(runs, train=failing_with(RunFailed("disk full")))


# --- trials ---------------------------------------------------------------------------------------


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


def test_a_run_stops_after_a_step_and_resumes_from_there(tiny, tmp_path: Path) -> None:
    config = tiny()
    for step in (1, 7, 7, 8):
        pretrain(config, step)
        assert newest_checkpoint(config.output.dir / "checkpoints")["step"] == step
        assert not (config.output.dir / "results.json").exists()
    pretrain(config)
    whole = pretrain(tiny(f"--output.dir={tmp_path / 'whole'}"))
    expected = newest_checkpoint(whole / "checkpoints")["model"]
    found = newest_checkpoint(config.output.dir / "checkpoints")["model"]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_default_candidates_scale_to_the_base_size_and_the_patch() -> None:
    assert SearchConfig().candidates == PAPER_BANDWIDTHS
    small = load_config(SearchConfig, [], ["--model.image_size=64", "--model.patch_size=8"])
    assert small.candidates == (32, 40, 48, 56, 64)


# --- whole searches -------------------------------------------------------------------------------


def weight_sum(folder: Path) -> float:
    """Score a run by a deterministic function of its weights."""
    state = newest_checkpoint(folder / "checkpoints")["model"]
    return sum(float(weight.double().abs().sum()) for weight in state.values()) % 10


@pytest.mark.parametrize("strategy", STRATEGIES)
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
    same = {"bandwidths", "value", "trial", "trials", "equivalent_epochs"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
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
    same = {"bandwidths", "value", "trial", "trials", "equivalent_epochs"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
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


def lines_in(log: Path) -> int:
    """Return how many lines a log has."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_a_killed_search_resumes(tiny_yaml: Path, tmp_path: Path) -> None:
    """By kill -9 at various moments; the result equals that of an uninterrupted search."""
    command = [sys.executable, "-m", "mae_et", "search", f"--config={tiny_yaml}", *SMALL,
               "--search.strategy=bayes", "--search.trials=5", "--search.held_out=0.3",
               "--curriculum.epochs=12"]  # fmt: skip
    whole = subprocess.run(
        [*command, f"--output.dir={tmp_path / 'a'}"], capture_output=True, check=True
    )
    log, kills, out = tmp_path / "b" / "trials.jsonl", 0, ""
    while not out:
        process = subprocess.Popen(
            [*command, f"--output.dir={tmp_path / 'b'}"], stdout=-1, stderr=-1, text=True
        )
        due = lines_in(log) + 3
        while process.poll() is None and lines_in(log) < due:
            time.sleep(0.02)
        time.sleep(0.1 * kills)  # in the middle of the next trial
        process.kill()
        out, err = process.communicate()
        assert process.returncode in {0, -signal.SIGKILL}, err
        kills += process.returncode != 0
    assert kills > 1
    first, second = (json.loads(text.splitlines()[-1]) for text in (whole.stdout, out))
    same = ("bandwidths", "value", "trial", "trials")
    assert [first[key] for key in same] == [second[key] for key in same]


def by_trials(found: dict) -> dict:
    """Return the figures of a search that do not depend on where it ran."""
    return {key: found[key] for key in ("bandwidths", "value", "trial", "trials")}


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
    assert by_trials(found[0]) == by_trials(found[1])


@pytest.mark.slow
def test_trials_run_as_a_slurm_array(
    cluster: Cluster, tiny_yaml: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """On a real SLURM; a search stopped while waiting finds its jobs again."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
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


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--search.candidates=[20,32]"], "search.candidates: 20 is not a multiple of the patch"),
        (["--search.candidates=[32]"], "search.candidates needs at least two"),
        (["--search.finetune=0"], "search.finetune must lie in"),
        (["--search.stages=0"], "search.stages must be positive"),
        (["--search.strategy=greedy", "--search.stages=1"], "at least 2: greedy"),
        (["--search.objective=accuracy"], "search.objective must be knn, linear or"),
        (["--search.objective=nowhere:function"], "nowhere:function is not found"),
        (["--search.objective=json:nothing"], "json:nothing is not found"),
        (["--search.cluster=nowhere"], "there is no cluster 'nowhere'"),
        (
            ["--optim.warmup_fraction=0.9"],
            "optim.warmup_fraction 0.9 is longer than the first of the 3 stages",
        ),
        (["--search.epochs=0.01"], "less than one step"),
        (
            ["--data.synthetic_train=12", "--search.held_out=0.01"],
            "too few to hold out a share of 0.01",
        ),
        (["--search.magnitude=11"], "search.magnitude must lie in"),
    ],
)
def test_user_errors_name_the_key_before_training(
    tiny_yaml: Path, tmp_path: Path, flags: list[str], sentence: str, capsys
) -> None:
    folder = tmp_path / "search"
    command = ["search", f"--config={tiny_yaml}", f"--output.dir={folder}", *SMALL, *flags]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
    assert not (folder / "trials").exists()


def test_a_config_file_cannot_name_an_objective_function(
    tiny_yaml: Path, tmp_path: Path, capsys
) -> None:
    tiny_yaml.write_text(f"{tiny_yaml.read_text()}search: {{objective: 'json:loads'}}\n")
    command = ["search", f"--config={tiny_yaml}", f"--output.dir={tmp_path / 's'}", *SMALL]
    assert main(command) == 2
    assert "search.objective json:loads names code, which a file may not" in capsys.readouterr().err


def test_another_search_in_the_folder_is_refused_unless_only_trials_grow(small) -> None:
    flags = ["--search.strategy=bayes", "--search.prune_from=null", "--search.trials=2"]
    search(small(*flags), lambda folder: 1.0, pretend)
    with pytest.raises(UserError, match=r"holds another search: search\.stages was 3 and is now 4"):
        search(small(*flags, "--search.stages=4"), lambda folder: 1.0, pretend)
    found = search(small(*flags, "--search.trials=5"), lambda folder: 1.0, pretend)
    assert found["trials"] == 5
    folder = small().output.dir
    with pytest.raises(UserError, match="holds a search on 40 images, the dataset now has 41"):
        check_same_images(TrialLog(folder / "trials.jsonl"), folder, 41)


def test_a_nan_objective_is_an_error(small, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "mine.py").write_text("def score(folder):\n    return float('nan')\n")
    monkeypatch.chdir(tmp_path)
    command = ["search", f"--config={tmp_path / 'tiny.yaml'}", "--output.dir=s", *SMALL]
    assert main([*command, "--search.objective=mine:score", "--curriculum.epochs=4"]) == 1
    assert "search.objective returned nan" in capsys.readouterr().err


def test_the_log_drops_the_partial_line_of_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path).append({"trial": "a", "value": 1})
    with path.open("a") as file:
        file.write('{"trial": "b", "va')
    log = TrialLog(path)
    log.append({"trial": "c", "value": 2})
    assert [record["trial"] for record in TrialLog(path).records] == ["a", "c"]
    truncate_partial_line(tmp_path / "none")


def test_a_damaged_log_is_reported_with_the_trials_that_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    log = TrialLog(path)
    for number in range(3):
        log.append({"trial": f"t{number}", "value": 10.5 + number, "bandwidths": [16, 32]})
    lines = path.read_bytes().splitlines(keepends=True)
    for bit in range(0, 8 * (len(lines[1]) - 1), 17):
        path.write_bytes(lines[0] + flipped(lines[1], bit) + lines[2])
        with pytest.raises(UserError, match=rf"{path} is damaged at line 2 of \d .*head -n 1"):
            TrialLog(path)
    for damage in (b"[1]\n", b"\xff\n", b"\n", b'{"trial": "x", "value": 99}\n'):
        path.write_bytes(lines[0] + damage + lines[1])
        with pytest.raises(UserError, match="is damaged at line 2 of 3"):
            TrialLog(path)
    path.write_bytes(lines[0])  # what the sentence advises
    assert [record["trial"] for record in TrialLog(path).records] == ["t0"]


def test_a_fork_needs_its_starting_checkpoint(small) -> None:
    config = small()
    first = stage_trial(config, 40, [], 24, None)
    second = stage_trial(config, 40, [24], 16, first)
    with pytest.raises(Exception, match="the search cannot resume from"):
        fork_checkpoint(second)


def test_curriculum_yaml_has_every_section(small) -> None:
    found = search(small(), lambda folder: 1.0, pretend)
    text = Path(found["curriculum"]).read_text()
    assert text.startswith("# Found by mae-et search (sequential, 9 trials")
    assert set(yaml.safe_load(text)) == {
        "model", "init", "data", "curriculum", "crop", "optim", "efficiency", "probe", "output",
        "seed",
    }  # fmt: skip
    assert yaml.safe_load(text)["optim"]["decay_fraction"] is None
