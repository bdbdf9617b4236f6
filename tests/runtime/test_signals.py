"""Signals that request a stop."""

import contextlib
import importlib
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import GOLDEN

from mae_et.cli.main import main
from mae_et.errors import Interrupted, Stopped
from mae_et.runtime.signals import StopFlag, stop_signals
from slurm.events import record_event


@pytest.fixture(autouse=True)
def sighup_as_outside_of_nohup() -> Iterator[None]:
    """The tests themselves may run under nohup, which lets processes ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_sighup_requests_a_stop_except_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with stop_signals() as flag:
        os.kill(os.getpid(), signal.SIGHUP)
    assert flag.signal is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(Stopped, match="stopped by SIGHUP; there was not"), stop_signals():
        os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize("error", [Interrupted(3, 15, "runs/a"), Stopped(15)])
def test_an_error_comes_back_from_a_process_pool_which_pickles_it(
    error: Interrupted | Stopped,
) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def stop_and_save(flag: StopFlag, number: int) -> None:
    flag.saves = True
    os.kill(os.getpid(), number)
    raise Interrupted(3, number, "run")


def import_that_swallows_everything() -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    with stop_signals():
        raise AssertionError("never reached")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_waits_only_where_there_is_something_to_save_and_is_never_lost(number) -> None:
    passed_on = []
    before = signal.signal(number, lambda *_: passed_on.append(number))
    try:
        with stop_signals() as flag:
            flag.saves = True
            os.kill(os.getpid(), number)
            assert flag.signal == number
            assert not passed_on
        assert passed_on == [number]  # nobody has acted on it: the next command must not start
        with pytest.raises(Interrupted), stop_signals() as flag:
            stop_and_save(flag, number)
        assert passed_on == [number]
    finally:
        signal.signal(number, before)


def test_third_sigint_kills_the_process_for_a_write_may_still_be_in_progress() -> None:
    """The second one waits for it; another exception would release the run folder before."""
    with contextlib.suppress(KeyboardInterrupt), stop_signals() as flag:
        flag.saves = True
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_signal_swallowed_by_an_import_stops_the_command_that_follows() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stop_signals():
        import_that_swallows_everything()
    with stop_signals() as flag:  # and no later one
        assert flag.signal is None


@pytest.mark.parametrize(
    ("number", "place", "status"),
    [
        (signal.SIGTERM, "mae_et.runtime.distributed.initialize", 143),
        (signal.SIGUSR2, "mae_et.training.opening.open_dataset", 140),
        (signal.SIGINT, "mae_et.training.build.fit_micro_batch", 130),
        (signal.SIGTERM, "mae_et.training.loop.train_step", 143),  # the first: it may compile
        (signal.SIGTERM, "mae_et.pretraining.write_results", 143),
    ],
)
def test_command_stopped_before_or_after_its_steps_says_one_line(
    tiny_yaml, tmp_path, monkeypatch, capsys, number: int, place: str, status: int
) -> None:
    owner, _, name = place.rpartition(".")
    module = importlib.import_module(owner)
    real = getattr(module, name)

    def struck(*given, **more):
        os.kill(os.getpid(), number)
        return real(*given, **more)

    monkeypatch.setattr(module, name, struck)
    run = tmp_path / "run"
    flags = [f"--output.dir={run}", "--efficiency.micro_batch=auto", "--curriculum.epochs=1"]
    assert (
        main(["pretrain", f"--config={tiny_yaml}", "--output.tensorboard=false", *flags]) == status
    )
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"mae-et: stopped by {signal.Signals(number).name}; there was not")
    assert sum(line.startswith("mae-et: stopped") for line in said) == 1
    assert (run / "results.json").exists() == (name == "write_results")


WEIGHTS = [f"--checkpoint={GOLDEN / 'mae_tiny_released_format.pth'}", "--encoder_num_heads=3"]
DATA = ["--data.name=synthetic", "--data.synthetic_train=8", "--data.synthetic_val=8"]


@pytest.mark.parametrize(
    ("number", "place", "words", "kept"),
    [
        (
            signal.SIGINT,
            "finetune.probing.features.normalise",
            ["knn", *WEIGHTS, *DATA],
            "scores and feature_cache files written before are kept; the same command starts over",
        ),
        (
            signal.SIGTERM,
            "finetune.probing.probes.probe_features",
            ["linear-probe", *WEIGHTS, *DATA],
            "scores and feature_cache files written before are kept; the same command starts over",
        ),
        (
            signal.SIGUSR2,
            "finetune.embedding.embed.pooled",
            ["embed", *WEIGHTS, *DATA],
            "saved rows are kept, and the same command resumes",
        ),
        (
            signal.SIGHUP,
            "slurm.run_status.job_states",
            ["status", "run"],
            "the runs continue",
        ),
        (
            signal.SIGTERM,
            "mae_et.checkpoints.writers.hugging_face.model_card",
            ["export", *WEIGHTS, "--decoder_num_heads=4", "--format=hf", "--output=hf"],
            "the same command starts over",
        ),
    ],
)
def test_command_without_a_run_stops_at_once_with_one_line(
    tmp_path, monkeypatch, capsys, number: int, place: str, words: list[str], kept: str
) -> None:
    owner, _, name = place.rpartition(".")
    module = importlib.import_module(owner)
    monkeypatch.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), number))
    monkeypatch.chdir(tmp_path)
    record_event(Path("run"), "started", job="7")
    workers = ["--num_workers=0", "--device=cpu"] if DATA[0] in words else []
    assert main([*words, *workers]) == 128 + number
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped by" in line]
    assert said == [f"mae-et: stopped by {signal.Signals(number).name}; {kept}"]
    assert not list(Path().rglob(".*.tmp"))
