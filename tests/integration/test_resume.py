"""A run that is killed at any moment and restarted ends like an uninterrupted one."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import exit_code
from steps import before_step, train_with

from mae_et import PretrainConfig, pretrain
from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint
from mae_et.io.metrics_file import read_metrics
from mae_et.training import loop
from mae_et.training.step import train_step

FORK = multiprocessing.get_context("fork")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_until(config: PretrainConfig, step: int, saving: bool = False) -> None:
    """Pre-train in a process that sends itself SIGKILL at a step, or before it is saved."""

    def target() -> None:
        torch.set_num_threads(1)
        if saving:
            real = loop.save

            def save(checkpoints, *rest, **more):
                if checkpoints.run.state.step == step:
                    kill()
                real(checkpoints, *rest, **more)

            loop.save = save
        train_with(train_step if saving else before_step(step, kill), config)

    process = FORK.Process(target=target)
    process.start()
    assert exit_code(process) == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(trained: Path) -> tuple[dict, list[float], list[int]]:
    plan = json.loads((trained / "plan.json").read_text())
    edges = [stage["start"] for stage in plan["stages"]][1:]
    saved = newest_checkpoint(trained / "checkpoints")
    assert saved is not None
    return saved, [(r["step"], r["loss"]) for r in read_metrics(trained)], edges


def same_end(folder: Path, saved: dict) -> None:
    again = newest_checkpoint(folder / "checkpoints")
    assert again is not None
    assert again["step"] == saved["step"]
    for name, weight in saved["model"].items():
        assert torch.equal(again["model"][name], weight), name
    for index, moments in saved["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(again["optimizer"]["state"][index][name], value)


@pytest.mark.parametrize(
    ("place", "workers"),
    [("before any checkpoint", 0), ("stage change", 2), ("last step", 0)],
)
def test_killed_run_resumes_to_the_same_bits(tiny, uninterrupted, place: str, workers: int) -> None:
    saved, _, edges = uninterrupted
    step = {
        "before any checkpoint": 3, "stage change": edges[1], "last step": saved["step"] - 1,
    }[place]  # fmt: skip
    # With a checkpoint at each step the run resumes exactly where it was killed.
    every = 5 if place == "before any checkpoint" else 1
    config = tiny(f"--efficiency.num_workers={workers}", f"--output.checkpoint_every={every}")
    run_until(config, step)
    steps = [int(path.stem[-8:]) for path in list_checkpoints(config.output.dir / "checkpoints")]
    assert steps == ([] if step == 3 else [step - 1, step])
    same_end(pretrain(config), saved)


def test_killed_run_replays_the_same_images(tiny) -> None:
    flags = ["--data.replay={16: 3, 24: 2}", "--data.replay_images=9"]
    whole = pretrain(tiny(*flags, f"--output.dir={tiny().output.dir}-whole"))
    saved = newest_checkpoint(whole / "checkpoints")
    assert saved is not None
    stages = json.loads((whole / "plan.json").read_text())["stages"]
    config = tiny(*flags, "--efficiency.num_workers=2", "--output.checkpoint_every=1")
    run_until(config, stages[1]["start"] + 2)
    same_end(pretrain(config), saved)


def test_kill_between_log_and_checkpoint_neither_doubles_nor_loses_a_row(
    tiny, uninterrupted
) -> None:
    saved, rows, _ = uninterrupted
    config = tiny()
    run_until(config, 10, saving=True)
    assert read_metrics(config.output.dir)[-1]["step"] == 10
    same_end(pretrain(config), saved)
    again = [(row["step"], row["loss"]) for row in read_metrics(config.output.dir)]
    assert again == rows


def test_a_kill_before_superseded_checkpoints_are_deleted_keeps_no_more(tiny) -> None:
    """Though the last checkpoint was written, so that the restarted run writes none."""
    config = tiny("--curriculum.epochs=1", "--output.checkpoint_every=2")
    newest = list_checkpoints(pretrain(config) / "checkpoints")
    shutil.copy(newest[0], newest[0].with_name("step-00000001.pt"))
    (config.output.dir / "results.json").unlink()
    pretrain(config)
    assert list_checkpoints(config.output.dir / "checkpoints") == newest


def test_damaged_newest_checkpoint_repeats_one_interval_with_a_warning(tiny, uninterrupted) -> None:
    saved, _, _ = uninterrupted
    config = tiny()
    run_until(config, 13)
    newest = list_checkpoints(config.output.dir / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.warns(UserWarning, match=r"step-00000010\.pt is damaged"):
        folder = pretrain(config)
    same_end(folder, saved)
    assert (newest.with_name("step-00000010.pt.damaged")).exists()


def test_damaged_checkpoints_do_not_count_as_newer(tiny, uninterrupted) -> None:
    """If they counted, each save before their step would be deleted at once."""
    saved, _, _ = uninterrupted
    config = tiny("--output.keep_last=1", "--output.checkpoint_every=2", "--output.keep_every=4")
    run_until(config, 17)
    for path in list_checkpoints(config.output.dir / "checkpoints")[-2:]:
        path.write_bytes(b"")
    run_until(config, 15)
    newest = list_checkpoints(config.output.dir / "checkpoints")[-1]
    assert newest.name == "step-00000014.pt"
    same_end(pretrain(config), saved)
