"""Jobs restart, resume and stop as their end and their limits say."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_et import RunFailed
from mae_et.cli.commands import config_of
from mae_et.cli.main import run
from mae_et.errors import Stopped
from mae_et.runtime import watchdog
from slurm import job, retry
from slurm.command import CommandLine, parse_task
from slurm.config import ClusterConfig
from slurm.events import START, log_file, read_events, record_event
from slurm.submission import _launcher


@pytest.fixture
def inside(place: Path, monkeypatch) -> list[str]:
    """Pretend to be the batch script of a running job; return the requests to SLURM."""
    asked: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(retry, "is_running", lambda: True)
    monkeypatch.setattr(retry, "requeue", lambda: asked.append("requeue") or True)
    return asked


def test_job_runs_where_it_was_submitted(place: Path, inside, monkeypatch) -> None:
    """Wherever the cluster starts it: a relative output.dir would be another folder there."""
    monkeypatch.setattr(job, "set_rank_environment", lambda folder: 1)
    seen: list[Path] = []
    payload = job.Job(lambda words: seen.append(Path.cwd()), [], place / "run")
    monkeypatch.chdir("/")
    payload()
    assert seen == [place]


@pytest.mark.parametrize(
    ("number", "limit", "expected"),
    [(signal.SIGUSR2, 59.0, "failed"), (signal.SIGUSR2, 61.0, "requeued"),
     (signal.SIGTERM, 0.0, "stopped")],
)  # fmt: skip
def test_time_limit_before_anything_is_saved_counts_as_a_crash(
    place: Path, inside, monkeypatch, number: int, limit: float, expected: str
) -> None:
    """It would be requeued for ever; a preemption may come at any time, and ends nothing."""

    def stopped(words: list[str]) -> None:
        raise Stopped(number)

    monkeypatch.setattr(job, "set_rank_environment", lambda folder: 0)
    monkeypatch.setattr(job, "is_running", lambda: False)
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=iter((0.0, 30.0)).__next__))
    monkeypatch.setattr(signal, "raise_signal", lambda number: None)
    payload = job.Job(stopped, [], place / "run", limit=limit)
    ends = {"failed": RunFailed, "stopped": SystemExit}  # a success would start the follow-ups
    with pytest.raises(ends[expected]) if expected in ends else contextlib.nullcontext():
        payload()
    assert [event["event"] for event in read_events(place / "run")] == ["started", expected]


@pytest.mark.parametrize(
    ("state", "expected"), [("RUNNING", "failed"), (None, "failed"), ("PENDING", "requeued")]
)
def test_job_that_slurm_does_not_requeue_fails(
    place: Path, inside, monkeypatch, state: str | None, expected: str
) -> None:
    """It would end as a success otherwise; SLURM also refuses if it has requeued the job itself."""

    def stopped(words: list[str]) -> None:
        raise Stopped(signal.SIGUSR2)

    def refuse(number: int) -> None:
        raise subprocess.CalledProcessError(1, "scontrol")

    monkeypatch.setattr(job, "set_rank_environment", lambda folder: 0)
    monkeypatch.setattr(job, "own_state", lambda: state)
    monkeypatch.setattr(signal, "raise_signal", refuse)
    with pytest.raises(RunFailed) if expected == "failed" else contextlib.nullcontext():
        job.Job(stopped, [], place / "run")()
    assert read_events(place / "run")[-1]["event"] == expected
    retry.main(place / "run", 1, 3)
    assert inside == (["requeue"] if expected == "failed" else [])


def test_signal_after_the_end_of_a_run_does_not_fail_its_job(place: Path, inside) -> None:
    """While Python exits, its handlers are gone and a signal's default ends the process."""
    program = (
        "import atexit, signal; from pathlib import Path; from slurm import job\n"
        "job.set_rank_environment = lambda folder: 0\n"
        "atexit.register(signal.raise_signal, signal.SIGUSR2)\n"
        "job.Job(print, [], Path('run'))()\n"
    )
    environment = os.environ | {"SUBMITIT_EXECUTOR": "slurm"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("delay", [120, 3000])
def test_limit_is_when_its_signal_comes(place: Path, delay: int) -> None:
    """With a long signal_delay the signal comes in the first half of the time."""
    task = parse_task(CommandLine(config_of, run), "pretrain", ["--output.dir=run"])
    cluster = ClusterConfig(time="60", signal_delay=delay)
    (payload,) = _launcher([task], cluster, place / "run", place).jobs
    assert payload.limit == 3600 - delay


def test_crash_restarts_until_there_is_no_progress(place: Path, inside, monkeypatch) -> None:
    folder = place / "run"
    steps = iter([100, 200, 200, 200])
    monkeypatch.setattr(retry, "read_progress", lambda folder: (next(steps), 0))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record_event(folder, "requeued", step=50)  # of an earlier start: no crash
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for _ in range(4):
        record_event(folder, "started")
        retry.main(folder, 1, 2)
    assert [event["event"] for event in read_events(folder)[2::2]] == ["retried"] * 3 + ["given up"]
    assert read_events(folder)[-1]["crashes"] == 3
    assert inside == ["requeue"] * 3


@pytest.mark.parametrize(
    ("event", "facts", "expected"),
    [
        ("failed", {"kind": "UserError", "sentence": "wrong"}, "given up"),
        ("failed", {"kind": "Diverged", "sentence": "NaN"}, "given up"),
        ("failed", {"kind": "UncompletedJobError", "sentence": "too often"}, "given up"),
        ("failed", {"kind": "RuntimeError", "sentence": "broke"}, "retried"),
        ("failed", {}, "retried"),  # of a damaged disk
        ("retried", {}, "retried"),
        ("requeued", {"step": 3}, "requeued"),
        ("stopped", {"step": 3}, "stopped"),
        ("finished", {}, "finished"),
    ],
)
def test_restart_depends_on_how_the_job_ended(
    place: Path, inside, event, facts: dict, expected: str
) -> None:
    record_event(place, event, **facts)
    retry.main(place, 1, 3)
    assert read_events(place)[-1]["event"] == expected
    assert inside == (["requeue"] if expected == "retried" else [])


def test_hung_job_restarts_with_its_reason(place: Path, inside) -> None:
    """A hung rank records nothing itself; its peer only lost it."""
    record_event(
        place, "failed", kind="PeerLost", sentence="the connection to another process broke"
    )
    retry.main(place, watchdog.EXIT_STATUS, 3)
    last = read_events(place)[-1]
    assert last["event"] == "retried"
    assert last["sentence"].startswith("no step or batch finished within step_timeout")


def test_job_that_slurm_refuses_to_requeue_is_given_up(place: Path, inside, monkeypatch) -> None:
    monkeypatch.setattr(retry, "requeue", lambda: False)
    retry.main(place, 1, 3)
    assert read_events(place)[-1]["event"] == "given up"


def test_succeeded_or_cancelled_job_is_not_restarted(place, inside, monkeypatch) -> None:
    retry.main(place, 0, 3)
    monkeypatch.setattr(retry, "is_running", lambda: False)
    retry.main(place, 143, 3)
    assert read_events(place) == []
    assert inside == []


def test_ranks_share_a_port_through_the_folder(place: Path, inside) -> None:
    port = job.shared_port(place, 0)
    assert 1024 <= port < 65536
    assert job.shared_port(place, 1) == port
    assert job.port_file(place).name == "port-7-2"


def test_stop_deadline_ends_a_blocked_process(place: Path) -> None:
    program = (
        "import ctypes, signal, sys; from slurm.stop_deadline import stop_deadline\n"
        "signal.signal(signal.SIGUSR2, lambda *_: print('handled'))\n"
        "with stop_deadline(0.5, lambda number: print('acted', number, flush=True)):\n"
        "    print('ready', flush=True)\n"
        "    while True: ctypes.CDLL(None).sleep(60)\n"
    )
    stuck = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert stuck.stdout is not None
    assert stuck.stdout.readline() == "ready\n"
    stuck.send_signal(signal.SIGUSR2)
    out, err = stuck.communicate(timeout=20)
    assert stuck.returncode == watchdog.EXIT_STATUS
    assert f"acted {int(signal.SIGUSR2)}" in out
    assert "Thread" in err  # its stack


def test_job_is_requeued_by_its_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(job, "PAUSES", (0,))
    scontrol = tmp_path / "scontrol"
    for status_of, queued in ((0, True), (1, False)):
        scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit {status_of}\n')
        scontrol.chmod(0o755)
        assert job.requeue() is queued
        assert (tmp_path / "asked").read_text() == "requeue 12\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert not job.requeue()


def test_busy_controller_is_asked_again(inside, monkeypatch) -> None:
    answers = iter([None, None, "RUNNING"])
    monkeypatch.setattr(job, "PAUSES", (0, 0))
    monkeypatch.setattr(job, "job_state", lambda job: next(answers))
    assert job.is_running()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("ModuleNotFoundError: No module named 'submitit'", "ModuleNotFoundError: No module"),
        ("srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are", "srun: fatal: SLURM_MEM"),
        ("srun: error: Unable to create step: busy", "srun: error: Unable to create step"),
        ("srun: unrecognized option '--x'", "srun: unrecognized option"),
        ("step 3/9 | loss 0.1", ""),
    ],
)
def test_cause_of_a_job_that_ends_before_its_run_is_its_last_error(
    tmp_path: Path, message: str, expected: str
) -> None:
    text = f"{START}\n{message}\nsrun: error: n1: task 0: Exited with exit code 1\n"
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "7_0_log.err").write_text(text)
    assert retry.cause(tmp_path, "7", [], 1).startswith(expected)
    assert bool(retry.cause(tmp_path, "7", [], 1)) == bool(expected)


@pytest.mark.parametrize(
    ("status", "messages", "expected"),
    [
        (1, [], ""),
        (137, ["n1: task 0: Killed", "n1: task 1: Terminated", "n2: task 2: Killed"], "n1: task 0"),
        (75, ["n1: task 0: Exited with exit code 75"], retry.HUNG),
        (137, ["n2: task 1: Killed", "n1: task 0: Exited with exit code 75"], retry.HUNG),
        (137, ["n1: tasks 0-1: Exited with exit code 75"], retry.HUNG),
        (137, ["n2: task 1: Killed", "n1: task 0: Exited with exit code 1"], "n2: task 1: Killed"),
    ],
)
def test_cause_is_read_from_srun_s_messages_in_any_order(
    tmp_path: Path, status: int, messages: list[str], expected: str
) -> None:
    record_event(tmp_path, "submitted", job="7", logs=str(tmp_path / "slurm"))
    events = read_events(tmp_path)
    path = log_file(tmp_path, events, "7")
    assert path == tmp_path / "slurm" / "7_0_log.err"
    assert retry.cause(tmp_path, "7", events, 1) == ""
    earlier = ["srun: error: n1: task 5: Killed", START]  # restarts append to the log
    path.write_text("\n".join([*earlier, *(f"srun: error: {line}" for line in messages), ""]))
    found = retry.cause(tmp_path, "7", events, status)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)
