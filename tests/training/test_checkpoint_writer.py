"""Checkpoints written while training continues: order, errors, kills, stop signals."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import exit_code
from steps import signal_at, train_with
from train_state import state

from mae_et import Interrupted, PretrainConfig, RunFailed, pretrain
from mae_et.checkpoints.store import list_checkpoints, load_checkpoint, newest_checkpoint
from mae_et.config.schema import OutputConfig
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime import watchdog
from mae_et.runtime.distributed import DistributedContext
from mae_et.training import checkpoint_writer, host_copy
from mae_et.training.checkpoint_writer import CheckpointWriter
from mae_et.training.host_copy import HostCopy
from mae_et.training.step import train_step

FORK = multiprocessing.get_context("fork")
LOGGER: Any = SimpleNamespace(flush=lambda: None, check_lock=lambda: None)


def run_in(folder: Path) -> Any:
    """Return what the writer reads of a run, after step 1."""
    config = PretrainConfig(output=OutputConfig(dir=folder, keep_last=2))
    plan = SimpleNamespace(to_dict=dict)
    world = DistributedContext(0, 1, torch.device("cpu"))
    return SimpleNamespace(
        config=config, plan=plan, world=world, state=state(1), provenance={}, keeps=lambda _: False
    )


def steps_in(folder: Path) -> list[int]:
    return [int(path.stem[-8:]) for path in list_checkpoints(folder / "checkpoints")]


class Gate:
    """Hold up each write of a checkpoint until `opened`, and record the steps written."""

    def __init__(self) -> None:
        self.opened, self.begun = threading.Event(), threading.Event()
        self.real, self.steps, self.active = checkpoint_writer.save_checkpoint, [], 0

    def save_checkpoint(self, folder: Path, saved: dict[str, Any], *rest: Any) -> None:
        self.active += 1
        assert self.active == 1  # never two at a time
        self.steps.append(saved["step"])
        self.begun.set()
        assert self.opened.wait(30)
        self.real(folder, saved, *rest)
        self.active -= 1


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", gate.save_checkpoint)
    yield gate
    gate.opened.set()


def test_training_continues_while_the_state_of_the_save_is_written(tmp_path: Path, gate) -> None:
    run = run_in(tmp_path)
    expected = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    with CheckpointWriter(run, LOGGER) as checkpoints:
        checkpoints.save(waits=False)
        assert gate.begun.wait(30)
        assert steps_in(tmp_path) == []
        next(run.state.model.parameters()).data += 1
        run.state.step = 2
        gate.opened.set()
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    assert saved["step"] == 1
    assert all(torch.equal(saved["model"][name], value) for name, value in expected.items())


def test_checkpoints_are_written_one_after_the_other_and_superseded_ones_deleted(
    tmp_path: Path, gate
) -> None:
    run = run_in(tmp_path)
    threading.Timer(0.2, gate.opened.set).start()
    with CheckpointWriter(run, LOGGER) as checkpoints:
        for run.state.step in (1, 2, 3):
            checkpoints.save(waits=False)
            assert steps_in(tmp_path)[-1:] == ([run.state.step - 1] if run.state.step > 1 else [])
        run.state.step = 4
        checkpoints.save(waits=True)
        assert steps_in(tmp_path) == [3, 4]
    assert gate.steps == [1, 2, 3, 4]


def test_without_room_for_a_copy_training_waits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(host_copy, "available_host_memory", lambda: 0)
    with CheckpointWriter(run_in(tmp_path), LOGGER) as checkpoints:
        checkpoints.save(waits=False)
        assert steps_in(tmp_path) == [1]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")


def test_an_error_of_the_writer_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    def save_twice() -> None:
        with CheckpointWriter(run_in(tmp_path), LOGGER) as checkpoints:
            checkpoints.save(waits=False)
            end = time.monotonic() + 30
            while not checkpoints.failed and time.monotonic() < end:
                time.sleep(0.01)
            checkpoints.save(waits=False)
            pytest.fail("the second save was silent")

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full_disk)
    with pytest.raises(RunFailed, match="cannot write file: No space left on device; what was"):
        save_twice()
    assert capsys.readouterr().err == ""  # reported once


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_any_error_of_the_disk_is_one_sentence_about_the_checkpoint(
    tmp_path: Path, monkeypatch, code: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    sentence = f"cannot write .*/step-00000001.pt: {os.strerror(code)}; what was saved is kept"
    writer = CheckpointWriter(run_in(tmp_path), LOGGER)
    with pytest.raises(RunFailed, match=sentence), writer as checkpoints:
        checkpoints.save(waits=True)


def test_a_write_that_fails_because_the_run_folder_is_gone_says_so(tmp_path: Path) -> None:
    def gone() -> None:
        raise RunFailed("the run folder was deleted")

    logger: Any = SimpleNamespace(flush=lambda: None, check_lock=gone)
    (tmp_path / "checkpoints").touch()
    writer = CheckpointWriter(run_in(tmp_path), logger)
    with pytest.raises(RunFailed, match="the run folder was deleted"), writer as checkpoints:
        checkpoints.save(waits=True)


def test_an_error_of_training_waits_for_the_write_and_hides_none_of_its_own(
    tmp_path: Path, gate, monkeypatch, capsys
) -> None:
    threading.Timer(0.2, gate.opened.set).start()

    def fail(folder: Path) -> None:
        with CheckpointWriter(run_in(folder), LOGGER) as checkpoints:
            checkpoints.save(waits=False)
            raise ZeroDivisionError

    for number in (1, 2):
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / str(number))
        monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full_disk)
    assert steps_in(tmp_path / "1") == [1]
    said = capsys.readouterr().err
    assert (
        said.count("the last checkpoint was not written: cannot write file: No space left on") == 1
    )


def test_a_run_ends_at_the_step_after_a_write_that_failed(tiny, monkeypatch) -> None:
    """Not five steps later, where the next checkpoint is due."""
    trained: list[int] = []

    def step(run, *rest):
        trained.append(run.state.step)
        if run.state.step == 5:
            time.sleep(1)  # the write of this step's checkpoint fails meanwhile
        return train_step(run, *rest)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full_disk)
    with pytest.raises(RunFailed, match="No space left on device; what was saved is kept"):
        train_with(step, tiny())
    assert trained[-1] == 5
    assert not (tiny().output.dir / "results.json").exists()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_it(tiny, trained) -> None:
    """Three steps later; the run resumes to the same bits."""
    config = tiny()

    def target() -> None:
        torch.set_num_threads(1)
        real, begun = torch.save, threading.Event()

        def half(payload, file):
            real(payload, file)
            if payload["step"] == 10:
                file.file.truncate(1000)
                begun.set()
                time.sleep(60)

        def step(run, *rest):
            if run.state.step == 13:
                assert begun.wait(30)
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(run, *rest)

        torch.save = half
        train_with(step, config)

    process = FORK.Process(target=target)
    process.start()
    assert exit_code(process) == -signal.SIGKILL
    assert steps_in(config.output.dir) == [5]
    again = newest_checkpoint(pretrain(config) / "checkpoints")
    whole = newest_checkpoint(trained / "checkpoints")
    assert again is not None
    assert whole is not None
    assert again["step"] == whole["step"]
    for name, weight in whole["model"].items():
        assert torch.equal(again["model"][name], weight), name
    rows = [[(row["step"], row["loss"]) for row in read_metrics(f)]
            for f in (config.output.dir, trained)]  # fmt: skip
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_write_that_hangs_ends_the_run_where_the_next_one_waits_for_it(tiny) -> None:
    config = tiny("--efficiency.step_timeout=5")

    def target() -> None:
        torch.set_num_threads(1)
        real, watchdog.PEERS_SECONDS = torch.save, 0.0

        def hangs(payload, file):
            real(payload, file)
            if payload["step"] == 10:
                time.sleep(100)

        torch.save = hangs
        pretrain(config)

    process = FORK.Process(target=target)
    process.start()
    assert exit_code(process) == watchdog.EXIT_STATUS
    assert steps_in(config.output.dir) == [5]
    assert read_metrics(config.output.dir)[-1]["step"] == 15


def test_a_stop_signal_saves_after_the_write_in_progress(tiny, gate) -> None:
    threading.Timer(1.0, gate.opened.set).start()
    with pytest.raises(Interrupted):
        train_with(signal_at(5), tiny())
    assert gate.steps == [5, 6]
    assert steps_in(tiny().output.dir) == [5, 6]


def test_processes_forked_while_a_checkpoint_is_written_leave_it_whole(tmp_path: Path) -> None:
    """As loader workers of a probe are; they hash and write, and all of them end."""
    run = run_in(tmp_path)
    run.state.model.register_buffer("large", torch.rand(2**22))

    def work() -> None:
        torch.save({"own": torch.rand(2**16)}, tmp_path / f"{os.getpid()}.pt")

    with CheckpointWriter(run, LOGGER) as checkpoints:
        for run.state.step in range(1, 11):
            checkpoints.save(waits=False)
            workers = [FORK.Process(target=work) for _ in range(2)]
            for worker in workers:
                worker.start()
            assert [exit_code(worker, 60) for worker in workers] == [0, 0]
    for step in (9, 10):
        saved = load_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}.pt")
        assert torch.equal(saved["model"]["large"], run.state.model.large)


def test_rows_have_the_seconds_for_which_checkpoints_held_up_training(tiny, monkeypatch) -> None:
    """Those since the row before; the time of steps and speeds excludes them."""
    real = HostCopy.take

    def slow(*given):
        time.sleep(0.5)
        return real(*given)

    monkeypatch.setattr(HostCopy, "take", slow)
    rows = read_metrics(pretrain(tiny("--output.checkpoint_every=10")))
    held = {row["step"]: row["checkpoint_seconds"] for row in rows if row["checkpoint_seconds"]}
    assert held.keys() == {11, 22}  # after steps 10 and 20; the last one has no row after it
    assert min(held.values()) > 0.5
    assert rows[-1]["seconds"] == pytest.approx(sum(row["window_seconds"] for row in rows))
