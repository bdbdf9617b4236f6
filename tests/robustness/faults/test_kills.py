"""A run killed fifty times resumes every time, to the result of an uninterrupted run."""

import importlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import same_weights
from steps import train_with
from tiny_run import TINY

from finetune import ClassifierConfig, classify
from mae_et import PretrainConfig, load_config, pretrain
from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint
from mae_et.curriculum.plan import Plan
from mae_et.io.metrics_file import read_metrics
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.tensorboard import TensorBoardWriter
from mae_et.training.step import train_step

FORK = multiprocessing.get_context("fork")
KILLS = 50
EVERY = 2  # steps between two checkpoints
module = importlib.import_module("mae_et.pretraining")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Strike:
    """Kill the current process at a given place of the run.

    Args:
        step: first step at which to kill.
        chance: draws where exactly.
        last: last step at which to kill.
    """

    def __init__(self, step: int, chance: random.Random, last: int = 10**9):
        self.last = last
        self.step, self.chance = step, chance
        self.train_step = train_step

    def in_a_step(self) -> None:
        def struck(run, stage, batches, loss_of):
            def passing():
                for batch in batches:
                    yield batch
                    if run.state.step >= self.step:
                        kill()  # with the batch loaded, before the weights are updated

            return train_step(run, stage, passing(), loss_of)

        self.train_step = struck

    def in_a_checkpoint(self) -> None:
        """After a random share of the file's bytes; at 1.0, between the file and its name."""
        real, share = torch.save, self.chance.choice([0.0, self.chance.random(), 1.0])

        def struck(payload, file):
            if payload["step"] < self.step:
                return real(payload, file)
            whole = io.BytesIO()
            real(payload, whole)
            file.write(whole.getvalue()[: int(len(whole.getvalue()) * share)])
            file.flush()
            return kill()

        torch.save = struck

    def between_file_and_name(self) -> None:
        self._at(Path, "replace", lambda path: self._due(re.findall(r"^\.step-(\d+)", path.name)))

    def between_name_and_pruning(self) -> None:
        writer = importlib.import_module("mae_et.training.checkpoint_writer")
        steps = lambda folder: [path.stem[-8:] for path in list_checkpoints(folder)]  # noqa: E731
        self._at(writer, "prune_checkpoints", lambda folder: self._due(steps(folder)))

    def in_a_row_of_the_log(self) -> None:
        real, share = RunLogger.log, self.chance.random()

        def struck(logger, row):
            if row["step"] < self.step:
                return real(logger, row)
            line = json.dumps(row) + "\n"
            logger.metrics.write(line[: int(len(line) * share)])
            logger.metrics.flush()
            return kill()

        RunLogger.log = struck

    def at_the_start(self) -> None:
        """While metrics and event files are rewritten from the rows."""
        owner, name = self.chance.choice([
            (RunLogger, "_rewrite"), (TensorBoardWriter, "_add_saved_images"),
            (TensorBoardWriter, "add_metrics"),
        ])  # fmt: skip
        rows = self.chance.randrange(10) if name == "add_metrics" else 0
        calls = iter(range(1000))
        self._at(owner, name, lambda *_, **__: next(calls) >= rows)

    def at_a_random_moment(self) -> None:
        """After a random delay; a few steps later at the latest."""
        self.step = min(self.step + 8, self.last)
        self.in_a_step()
        signal.signal(signal.SIGALRM, lambda *_: kill())
        signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(0.02, 0.8))

    def _due(self, steps: list[str]) -> bool:
        return bool(steps) and int(steps[-1]) >= self.step

    def _at(self, owner: object, name: str, due) -> None:
        real = getattr(owner, name)

        def struck(first, *rest, **more):
            if due(first):
                kill()
            return real(first, *rest, **more)

        setattr(owner, name, struck)


PLACES = [name for name in vars(Strike) if not name.startswith("_")]


def attempt(config: Any, strike: Strike, place: str, train=pretrain) -> int:
    """Resume a run in a process that is killed at `place`; return its exit code."""

    def target() -> None:
        torch.set_num_threads(1)
        getattr(strike, place)()
        train_with(strike.train_step, config, train)
        os._exit(0)

    process = FORK.Process(target=target)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.faults
def test_run_killed_fifty_times_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer, encoder, and every row's loss; no row twice, none missing.

    Six in seven kills are aimed (in a step, within a checkpoint's bytes, between it and its name,
    before the older ones are deleted, in a line of the log, while files are written again at a
    start), the others come by the clock. Both changes of stage are aimed at.
    """
    torch.set_num_threads(1)
    (tmp_path / "tiny.yaml").write_text(TINY)

    def config(name: str, *flags: str) -> PretrainConfig:
        shared = ["--curriculum.epochs=14", f"--output.checkpoint_every={EVERY}", *flags]
        where = f"--output.dir={tmp_path / name}"
        return load_config(PretrainConfig, [tmp_path / "tiny.yaml"], [*shared, where])

    clean = pretrain(config("clean"))
    plan = Plan.from_dict(json.loads((clean / "plan.json").read_text()))
    changes = [stage.start for stage in plan.stages[1:]]
    chance, kills, resumed = random.Random(7), Counter(), []
    for number in range(KILLS):
        folder = tmp_path / "killed" / "checkpoints"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that is in place is damaged
            saved = newest_checkpoint(folder)
        step = saved["step"] if saved else 0
        assert step >= (resumed[-1] if resumed else 0)  # nothing that was saved is lost
        resumed.append(step)
        place = PLACES[number % len(PLACES)]
        # Spread over the whole run; where a change of stage is near, at it.
        target = max(step + chance.randint(1, 3), plan.steps * (number + 1) // (KILLS + 1))
        ahead = [change for change in changes if abs(change - target) < 3]
        target = min(ahead[0] if ahead else target, plan.steps - 1)
        workers = f"--efficiency.num_workers={int(number % 10 == 9)}"
        code = attempt(config("killed", workers), Strike(target, chance, plan.steps - 1), place)
        # 0: it came to its end before it was struck
        assert code == -signal.SIGKILL, (number, place, step, target, code)
        kills[place] += 1
    done = pretrain(config("killed"))
    assert sum(kills.values()) == KILLS
    assert min(kills[place] for place in PLACES) >= KILLS // len(PLACES)
    assert resumed[-1] >= changes[-1]  # it was killed in every stage
    assert same_weights(done, clean)
    encoders = [(folder / "encoder.safetensors").read_bytes() for folder in (done, clean)]
    assert encoders[0] == encoders[1]
    rows, expected = ([(r["step"], r["loss"]) for r in read_metrics(f)] for f in (done, clean))
    assert rows == expected
    leftovers = [path.name for path in done.rglob("*") if path.name.endswith((".tmp", ".damaged"))]
    assert leftovers == []
    print(f"\n{KILLS} kills: {dict(kills)}; resumed from steps {sorted(set(resumed))}")


@pytest.mark.faults
def test_classifier_killed_while_saving_its_best_weights_keeps_the_correct_ones(tmp_path) -> None:
    """Before and after the weights, and before and after their score, are written."""
    torch.set_num_threads(1)
    evaluation = importlib.import_module("finetune.training.results")

    def config(name: str) -> ClassifierConfig:
        flags = [
            "--model={backbone: test_vit, image_size: 32}", f"--output.dir={tmp_path / name}",
            "--data={name: synthetic, synthetic_size: 32, synthetic_train: 16, synthetic_val: 10}",
            "--optim={batch_size: 8, base_lr: 0.05}", "--curriculum.epochs=4",
            "--efficiency={num_workers: 0, device: cpu}",
            "--output={evaluate_every: 2, checkpoint_every: 2, tensorboard: false}",
        ]  # fmt: skip
        return load_config(ClassifierConfig, [], flags)

    expected = classify(config("clean"))
    for owner, name in ((evaluation, "write_weights"), (evaluation.RunLogger, "log_scores")):
        for when in ("before", "after"):

            def target(owner=owner, name=name, when=when) -> None:
                real = getattr(owner, name)
                setattr(owner, name, lambda *given: (when == "after" and real(*given), kill()))
                classify(config("killed"))

            process = FORK.Process(target=target)
            process.start()
            process.join(120)
            assert process.exitcode == -signal.SIGKILL, (name, when)
    found = classify(config("killed"))
    assert (found["best_step"], found["top1"]) == (expected["best_step"], expected["top1"])
    best = [(tmp_path / run / "best.safetensors").read_bytes() for run in ("clean", "killed")]
    assert best[0] == best[1]


@pytest.mark.faults
def test_run_killed_while_writing_results_finishes_on_restart(tmp_path) -> None:
    """Killed while the encoder and the final results are written, it writes them again."""
    torch.set_num_threads(1)
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = ["--curriculum.epochs=2", f"--output.dir={tmp_path / 'run'}"]
    config = load_config(PretrainConfig, [tmp_path / "tiny.yaml"], flags)
    session = importlib.import_module("mae_et.training.session")
    owners = {"export_encoder": module, "summarise_stages": session, "finish": module.Pretraining}
    for name, owner in owners.items():

        def target(owner=owner, name=name) -> None:
            setattr(owner, name, lambda *_: kill())
            pretrain(config)

        process = FORK.Process(target=target)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, name
    began = time.monotonic()
    folder = pretrain(config)
    assert (folder / "results.json").exists()
    assert time.monotonic() - began < 60
