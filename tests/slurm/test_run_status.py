"""`mae-et status` from a run folder alone."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.cli.main import main
from mae_et.io.lock import sole_writer
from mae_et.io.metrics_file import SCORES, row_line
from mae_et.io.score_records import write_record
from slurm import squeue
from slurm.events import events_file, record_event
from slurm.run_status import status, unfinished
from slurm.status_table import table, watch


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch) -> None:
    """Answer every query as a machine without SLURM does."""
    monkeypatch.setattr(squeue, "run_program", lambda *_: None)


def test_status_is_json_serialisable(tmp_path: Path) -> None:
    record_event(tmp_path, "started", job="7")
    (about,) = json.loads(json.dumps([dataclasses.asdict(each) for each in status([tmp_path])]))
    assert about["run"] == str(tmp_path)


@pytest.mark.parametrize("key", ["seconds", "compute", "loss", "time"])
@pytest.mark.parametrize("value", ["Infinity", "NaN", "1" + "0" * 400])
def test_status_skips_metric_rows_with_non_finite_values(tmp_path: Path, key, value) -> None:
    """A flipped bit can write such a value, and the remaining time is computed from it."""
    row = {"step": 1, "stage": 0, "time": time.time(), "seconds": 1.0, "compute": 0.5}
    lost = json.dumps(row | {"step": 2, key: 0}).replace(f'"{key}": 0', f'"{key}": {value}')
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{lost}\n{'[' * 100_000}\n{{}}\n")
    with pytest.warns(UserWarning, match="skipped line 3$"):
        (found,) = status([tmp_path])
    assert (found.state, found.step, round(found.eta or 0)) == ("running", 1, 1)
    assert "0:00:01" in table([found])


def test_run_outside_slurm_that_ended_is_stopped_at_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert status([tmp_path])[0].state == "not started"
    with sole_writer(tmp_path):
        assert status([tmp_path])[0].state == "running"  # before its first row
    assert status([tmp_path])[0].state == "stopped"
    row = {"step": 1, "stage": 0, "time": time.time(), "seconds": 1.0, "compute": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with sole_writer(tmp_path):
        held = (tmp_path / ".lock").read_text()
        assert status([tmp_path])[0].state == "running"
    assert status([tmp_path])[0].state == "stopped"  # by a signal or an error
    machine, process = held.rsplit(maxsplit=1)
    # A container may share the machine's name, but not its process ids.
    assert str(Path("/proc/self/ns/pid").readlink()) in machine
    for writer, state in (
        (f"{machine} 999999999", "stopped"),  # killed on this machine
        (f"elsewhere {process}9", "running"),
        ("", "running"),  # locked by an earlier version
    ):
        (tmp_path / ".lock").write_text(writer)
        assert status([tmp_path])[0].state == state
    (tmp_path / ".lock").write_text("ended")
    os.utime(tmp_path / ".lock", (1, 1))
    record_event(tmp_path, "started", job="7")  # again, and the lock is not yet taken
    assert status([tmp_path])[0].state == "running"


def test_status_shows_the_last_score(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    rows = [
        {"step": 0, "knn": 14.4},
        {"step": 5, "knn": 25.9, "effective_rank": 9.0, "ridge": None, "val_images": 60},
    ]
    (tmp_path / SCORES).write_text("".join(row_line(row, SCORES) for row in rows))
    (found,) = status([tmp_path])
    assert found.scores == {"knn": 25.9, "effective_rank": 9.0, "val_images": 60}
    assert "kNN 25.9 ± 5.6 % (n = 60)" in table([found])


def test_a_job_that_scores_shows_its_own_and_a_run_its_encoder_s_on_all_images(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / SCORES).write_text(row_line({"step": 5, "knn": 25.9, "ridge": 30.0}, SCORES))
    for kind, score in (("knn", {"knn": 34.57}), ("linear-probe", {"linear": 37.33})):
        record_event(tmp_path / kind, "submitted", job="7")
        write_record(tmp_path / kind, {"data": "few"} | dict.fromkeys(score, 50.0))
        write_record(tmp_path / kind, {"data": "synthetic"} | score)
    assert status([tmp_path])[0].scores == {"knn": 25.9, "ridge": 30.0}  # of earlier weights
    (tmp_path / "results.json").write_text("{}")
    run, knn, linear = status([tmp_path])
    assert run.scores == {"knn": 34.57, "linear": 37.33, "ridge": 30.0}
    assert (knn.scores, linear.scores) == ({"knn": 34.57}, {"linear": 37.33})
    assert "linear 37.33 %" in table([linear])


def test_the_table_of_a_sweep_has_a_row_for_every_run_with_the_reason_of_its_failure(
    tmp_path: Path, capsys
) -> None:
    record_event(tmp_path, "submitted", job="8", kind="compare")
    good, bad, unscored = (tmp_path / f"batch_size={size}" for size in (64, 1000, 128))
    record_event(bad, "failed", sentence="optim.batch_size 1000 is larger than the dataset")
    record_event(unscored / "knn", "failed", sentence="no classes " + 99 * "long ")
    for run in (good, unscored):
        record_event(run, "finished", job="7")
        (run / "results.json").write_text('{"loss": 0.5}')
    table = tmp_path / "results.md"
    assert main(["compare", *map(str, (good, bad, unscored, tmp_path)), f"--output={table}"]) == 0
    head, _, *rows = (
        [c.strip() for c in line.split("|")[1:4]] for line in table.read_text().splitlines()
    )
    assert head == ["run", "state", "loss"]
    assert rows[:2] == [
        ["batch_size=64", "", "0.5"],
        ["batch_size=1000", "failed: optim.batch_size 1000 is larger than the dataset", ""],
    ]
    assert rows[2][1].startswith("knn failed: no classes long")
    assert rows[2][1].endswith("long ...")
    assert f"not compared, as they hold no run: {tmp_path}" in capsys.readouterr().err
    assert set(unfinished([good, bad])) == {bad}


def test_a_folder_of_runs_shows_follow_ups_and_the_runs_of_sweeps_and_searches(tmp_path) -> None:
    (tmp_path / "images" / "a" / "slurm").mkdir(parents=True)  # not searched: neither is a run
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "metrics.jsonl").touch()
    (tmp_path / "local" / "itself").symlink_to(tmp_path / "local")
    (tmp_path / "sweep" / "slurm").mkdir(parents=True)
    (tmp_path / "search" / "slurm").mkdir(parents=True)
    runs = [
        "local", "local/finetune", "search/trials/bayes-01", "sweep/seed=0", "sweep/seed=0/knn",
    ]  # fmt: skip
    for run in runs[1:]:
        record_event(tmp_path / run, "finished", job="7")
    found = [each.run.removeprefix(f"{tmp_path}/") for each in status([tmp_path])]
    assert [run for run in found if "itself" not in run] == runs


def test_a_folder_of_scores_is_not_finished_while_its_next_job_waits(tmp_path: Path) -> None:
    record_event(tmp_path, "started", job="7")
    write_record(tmp_path, {"data": "a", "knn": 50.0})
    os.utime(tmp_path / "results.json", (time.time() + 1,) * 2)
    assert status([tmp_path])[0].state == "finished"
    os.utime(tmp_path / "results.json", (1, 1))
    record_event(tmp_path, "started", job="8")
    (found,) = status([tmp_path])
    assert (found.state, found.scores) == ("running", {"knn": 50.0})
    record_event(tmp_path, "finished", job="8")
    assert status([tmp_path])[0].state == "finished"


def test_a_job_that_stopped_early_is_stopped_until_its_run_has_results(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    record_event(tmp_path, "finished", job="7")
    assert status([tmp_path])[0].state == "stopped"
    (tmp_path / "results.json").write_text("{}")
    assert status([tmp_path])[0].state == "finished"


@pytest.mark.parametrize(
    ("events", "restarts"),
    [
        ([("submitted", "1", 0)], 0),
        ([("submitted", "1", 0), ("started", "1", 0)], 0),
        ([("submitted", "1", 0), ("started", "1", 1)], 1),  # the first start left no event
        ([("started", "1", 0), ("started", "1", 3), ("failed", "1", 3)], 3),
        ([("started", "1", 0), ("submitted", "2", 0), ("started", "2", 1)], 2),
        ([("started", "local", None), ("started", "local", None)], 1),
    ],
)
def test_restarts_count_jobs_that_were_killed_before_their_first_event(
    tmp_path: Path, events, restarts: int
) -> None:
    for event, job, restart in events:
        record_event(tmp_path, event, job=job, **({} if restart is None else {"restart": restart}))
    (found,) = status([tmp_path])
    assert found.restarts == restarts


@pytest.mark.parametrize(
    ("line", "restarts"),
    [
        ("7|N/A|RUNNING|1|node1", 1),  # killed before its first event, and running again
        ("7|N/A|PENDING|1|(Priority)", 0),  # not yet started again
        ("7|N/A|RUNNING|0|node1", 0),
        ("7|N/A|RUNNING|?|node1", 0),
        ("7|3|RUNNING|2|node1", 0),  # another job's element
        ("no table", 0),
    ],
)
def test_restart_of_a_job_without_events_is_seen_in_the_queue(
    tmp_path: Path, monkeypatch, line: str, restarts: int
) -> None:
    queue = {"squeue": line, "sacct": None}
    monkeypatch.setattr(squeue, "run_program", lambda program, *_: queue[program])
    record_event(tmp_path, "submitted", job="7", restart=0)
    assert status([tmp_path])[0].restarts == restarts


@pytest.mark.parametrize("state", ["BOOT_FAIL", "DEADLINE", "PREEMPTED"])
def test_watching_ends_with_the_job_whatever_ended_it(tmp_path: Path, monkeypatch, state) -> None:
    queue = {"squeue": "", "sacct": f"7|{state}"}
    monkeypatch.setattr(squeue, "run_program", lambda program, *_: queue[program])
    record_event(tmp_path, "submitted", job="7", restart=0)
    watch([tmp_path], 1e6)


def test_interrupting_the_watch_says_that_the_runs_continue(tmp_path, monkeypatch, capsys) -> None:
    record_event(tmp_path, "submitted", job="7", restart=0)
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["status", str(tmp_path), "--watch"]) == 130
    assert capsys.readouterr().err == "mae-et: stopped by SIGINT; the runs continue\n"


def test_a_stop_by_a_signal_is_no_error(tmp_path: Path, monkeypatch) -> None:
    """Though its job fails, so that no follow-ups start."""
    (log := tmp_path / "slurm" / "7_0_log.err").parent.mkdir()
    killed = "srun: error: n1: task 0: Killed"
    log.write_text(f"{killed}\nsrun: launch/slurm: _step_signal: Terminating StepId=7.0\n")
    record_event(tmp_path, "submitted", job="7", logs=str(log.parent))
    assert status([tmp_path])[0].error == ""
    monkeypatch.setattr(squeue, "run_program", lambda *_: "7|N/A|FAILED|0|None\n")
    assert status([tmp_path])[0].error == killed
    record_event(tmp_path, "stopped", job="7", step=917, signal=15)
    (found,) = status([tmp_path])
    assert (found.state, found.error) == ("stopped", "")
    monkeypatch.setattr(squeue, "run_program", lambda *_: None)
    (found,) = status([tmp_path])
    assert (found.state, found.error) == ("stopped", "")


def test_impossible_intervals_are_refused(tmp_path: Path, capsys) -> None:
    for seconds in ("-1", "0", "1e9"):
        assert main(["status", str(tmp_path), f"--watch={seconds}"]) == 2
        assert "watch must lie in" in capsys.readouterr().err


HUGE = "1" + "0" * 400


@pytest.mark.parametrize("key", ["time", "lost", "restart"])
@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", HUGE, "true", '"1"'])
def test_events_with_impossible_numbers_are_skipped(tmp_path: Path, key: str, value: str) -> None:
    record_event(tmp_path, "started", job="7")
    line = json.dumps({"time": 9.0, "event": "started", "job": "8"} | {key: 0})
    with events_file(tmp_path).open("a") as file:
        file.write(line.replace(f'"{key}": 0', f'"{key}": {value}') + "\n")
    (found,) = status([tmp_path])
    assert (found.restarts, found.lost) == (0, 0)


ROW = '{"step": 1, "stage": 0, "time": 1, "seconds": 1, "compute": 1, "window_seconds": 1}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", '{"stages": [{"steps": 1e400}]}'),
        ("plan.json", '{"stages": [{"steps": "x"}]}'),
        ("metrics.jsonl", ROW.replace('seconds": 1}', 'seconds": "x"}') + "\n"),
        ("metrics.jsonl", ROW.replace('"step": 1', f'"step": {HUGE}') + "\n"),
        ("scores.jsonl", "[1]\n[2]\n"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_damaged_records_leave_the_rest_of_the_status(tmp_path: Path, name, content) -> None:
    record_event(tmp_path, "started", job="7")
    (tmp_path / name).write_text(content)
    (found,) = status([tmp_path])
    assert (found.state, found.step, found.steps, found.scores) == ("running", 0, None, {})
    assert "inf" not in table([found])


def test_error_before_the_last_start_is_marked_as_old(tmp_path: Path) -> None:
    record_event(tmp_path, "started", job="1", restart=0)
    record_event(tmp_path, "failed", job="1", restart=0, sentence="the disk is full")
    assert status([tmp_path])[0].error == "the disk is full"
    record_event(tmp_path, "started", job="1", restart=1)
    assert status([tmp_path])[0].error == "before its last restart: the disk is full"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"loss": ', "\x00" * 20])
def test_run_with_damaged_results_is_damaged_and_not_finished(tmp_path: Path, content: str) -> None:
    record_event(tmp_path, "started", job="1")
    record_event(tmp_path, "finished", job="1")
    (tmp_path / "results.json").write_text("{}")
    assert (status([tmp_path])[0].state, status([tmp_path])[0].error) == ("finished", "")
    (tmp_path / "results.json").write_text(content)
    (found,) = status([tmp_path])
    assert found.state == "damaged"
    assert "results.json cannot be read" in found.error


def test_status_needs_only_the_run_folder(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = place / "run"
    assert (
        main(["pretrain", "--config=tiny.yaml", "--output.dir=run", "--output.tensorboard=false"])
        == 0
    )
    record_event(run, "submitted", job="12", restart=0, executor="slurm", logs=str(run / "slurm"))
    record_event(run, "started", job="12", restart=0, step=0, lost=0)
    record_event(run, "started", job="12", restart=1, step=5, lost=3)
    (run / "results.json").unlink()
    record_event(run, "failed", kind="RunFailed", sentence="no memory left")
    (found,) = status([place])
    assert (found.state, found.restarts, found.lost) == ("failed", 1, 3)
    assert (found.step, found.steps, found.stage, found.bandwidth) == (25, 25, "3/3", 32)
    lines = table([found]).splitlines()
    assert lines[0].split()[:4] == ["run", "job", "state", "step"]
    assert lines[-1].endswith("no memory left")
    capsys.readouterr()
    assert main(["status", str(run), "--watch=0.1"]) == 0
    assert "failed" in capsys.readouterr().out
    assert main(["status", "nowhere"]) == 2
    (place / "empty").mkdir()
    with pytest.raises(UserError, match="contains no run"):
        status([place / "empty"])
    assert status([run, place / "empty", place / "tiny.yaml"]) == status([run])
    assert f"hold no run: {place / 'empty'}, {place / 'tiny.yaml'}" in capsys.readouterr().err


def test_status_without_slurm_depends_on_the_last_events_age(place: Path, monkeypatch) -> None:
    """The id of a SLURM job is not mistaken for a process of this machine."""
    monkeypatch.setenv("PATH", "/nowhere")
    run, submitted = place / "run", {"job": "1", "restart": 0, "logs": "slurm"}
    record_event(run, "submitted", executor="slurm", **submitted)
    assert status([run])[0].state == "not started"
    record_event(run, "started", job="1", restart=0, step=0, lost=0)
    assert status([run])[0].state == "running"
    monkeypatch.setattr(sys.modules["slurm.run_status"], "SILENCE_SECONDS", 0)
    assert status([run])[0].state == "stopped"
    record_event(run, "submitted", executor="local", **submitted)
    record_event(run, "started", job="1", restart=0, step=0, lost=0)
    assert status([run])[0].state == "running"
    record_event(run, "submitted", executor="local", **submitted | {"job": "4999999"})
    assert status([run])[0].state == "not started"
    record_event(run, "started", job="4999999", restart=0, step=0, lost=0)
    assert status([run])[0].state == "stopped"


def test_a_process_of_another_machine_is_not_looked_for_on_this_one(place: Path) -> None:
    run = place / "elsewhere"
    facts = {"job": "4999999", "restart": 0, "logs": "slurm"}
    record_event(run, "submitted", executor="local", machine="node7 pid:[4026531836]", **facts)
    record_event(run, "started", job="4999999", restart=0, step=0, lost=0)
    (found,) = status([run])
    assert (found.state, found.reason) == ("unknown", "a process of node7: ask there")
    assert "  unknown (a process of node7: ask there)  " in table([found])
