"""Submission without a cluster: scripts, copies, restarts, local jobs, status."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_et import RunFailed, UserError
from mae_et.cli.arguments import config_of
from mae_et.cli.main import main, run
from mae_et.config.commands import CompareConfig
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.errors import Stopped
from mae_et.monitoring.compare import compare
from mae_et.runtime import watchdog
from slurm import ClusterConfig, job, retry, status, trials
from slurm.command import CommandLine, follow_up, freeze_configs, parse_task, sweep_tasks
from slurm.events import read_events, record_event
from slurm.snapshot import snapshot
from slurm.status_table import table
from slurm.stop_deadline import EXIT_STATUS

COMMAND_LINE = CommandLine(config_of, run)
RUN = ["--config=tiny.yaml", "--output.dir=run"]


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("1-00", 1440), ("2-12:00:00", 3600)],
)
def test_time_is_parsed_as_slurm_does(written: str, minutes: int) -> None:
    assert ClusterConfig(time=written).minutes == minutes


def test_one_rank_per_gpu_by_default() -> None:
    assert ClusterConfig(nodes=2, gpus_per_node=8).ranks == 16
    assert ClusterConfig(nodes=2).ranks == 2
    assert ClusterConfig(tasks_per_node=4).ranks == 4
    one = ClusterConfig(nodes=4, gpus_per_node=8, memory_gb=480, partition="gpu").single()
    assert (one.ranks, one.gpus_per_node, one.memory_gb, one.partition) == (1, 1, 60, "gpu")
    typed = ClusterConfig(nodes=2, gpus_per_node="a100:4")
    assert (typed.ranks, typed.single().gpus_per_node) == (8, "a100:1")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--nodes=0", "nodes must be positive"),
        ("--gpus_per_node=a100", "a number, or a type and a number such as a100:4, got a100"),
        ("--executor=local --nodes=2", "local runs on one machine"),
        ("--executor=debug --tasks_per_node=2", "debug runs one rank"),
        ("--retries=-1", "retries must not be negative"),
        ("--time=0", "at least a minute"),
        ("--time=2 --signal_delay=120", r"signal_delay 120 s leaves nothing of time 2 \(2 min\)"),
        ("--memory_gb=.inf", "memory_gb must be positive"),
        ("--extra={'array':2}", "extra has 'array', which mae-et sets itself"),
    ],
)
def test_invalid_cluster_config_is_refused(flag: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(ClusterConfig, [], flag.split())


def test_dry_run_prints_script_and_config_without_slurm(place, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    flags = ["--cluster=nodes_8x8gpu", "--partition=gpu", "--account=lab", "--extra={gres: 'x:1'}"]
    run = [*RUN, "--optim.batch_size=64", "--data.synthetic_train=64"]
    assert main(["submit", "pretrain", *run, *flags, "--dry-run", "--then=knn"]) == 0
    out = capsys.readouterr().out
    for line in (
        "--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=8", "--partition=gpu", "--account=lab",
        "--mem=491520M", "--time=1440", "--signal=USR2@120", "--requeue", "--gres=x:1",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in out
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in out
    assert "encoder_embed_dim: 32" in out
    assert "# mae-et knn --checkpoint=run --output=run/knn" in out
    assert "#SBATCH --ntasks-per-node=1\n" in out  # a probe runs on one rank
    assert list(place.iterdir()) == [place / "tiny.yaml"]


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("--sweep=curriculum.epochs=4.5,0.1", "epochs 0.1 leaves stage 1"),
     ("--curriculum.epochs=1e18", "curriculum.epochs 1e+18 is a budget of"),
     ("--optim.batch_size=48", "batch_size 48 is larger than the dataset of 40 images")],
)  # fmt: skip
def test_an_impossible_plan_is_refused(flag: str, sentence: str, place, capsys) -> None:
    """Also of one run of a sweep; the number of synthetic images is known."""
    assert main(["submit", "pretrain", *RUN, flag, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err
    assert list(place.iterdir()) == [place / "tiny.yaml"]


def test_shell_words_are_quoted(place, capsys) -> None:
    flags = ["--output.dir=a b;$(c)", "--name=x y", "--extra={comment: 'a; b'}", "--dry-run"]
    assert main(["submit", "pretrain", RUN[0], *flags]) == 0
    script = capsys.readouterr().out.partition("# mae-et")[0]
    folder = place / "a b;$(c)" / "slurm"
    assert f"'{folder}'" in script
    assert "#SBATCH --job-name='x y'" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_two_jobs_with_one_folder_are_refused(place, capsys) -> None:
    for flag, sentence in (
        ("--then=knn,knn", "two jobs would write to run/knn: give each"),
        ("--sweep=seed=0,0", "seed=0 and seed=0 are the same run"),
        ("--sweep=optim.base_lr=0.1,1e-1", "base_lr=0.1 and base_lr=1e-1 are the same run"),
    ):
        assert main(["submit", "pretrain", *RUN, "--dry-run", flag]) == 2
        assert sentence in capsys.readouterr().err
    first = parse_task(COMMAND_LINE, "pretrain", RUN)
    assert [run.folder.name for run in sweep_tasks(first, ["seed=0, 1"])] == ["seed=0", "seed=1"]
    assert len(sweep_tasks(first, ["output.log_every=1,2"])) == 2


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--gpus", "did you mean gpus_per_node?"), ("--exclusive", "takes any option of sbatch")],
)
def test_unknown_flag_suggests_keys_of_the_cluster(place, capsys, flag: str, hint: str) -> None:
    assert main(["submit", "pretrain", *RUN, "--dry-run", flag, "1"]) == 2
    assert f"there is no flag {flag}; " in (said := capsys.readouterr().err)
    assert hint in said


def test_a_missing_checkpoint_is_reported_and_may_be_another_job_s(place, capsys) -> None:
    """Of scores, classifiers and initial weights; only the first job waits for the other one."""
    folder, wait = "--output.dir=run", ["--dependency=afterok:7", "--dry-run"]
    assert main(["submit", "knn", "runs/a", "--data.name=synthetic", *wait]) == 0
    assert main(["submit", "finetune", "runs/a", "--data.name=synthetic", folder, *wait]) == 0
    assert main(["submit", "pretrain", *RUN, "--init=runs/a", "--then=knn", *wait]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("warning: runs/a does not exist on this machine") == 3
    assert shown.out.count("#SBATCH --dependency=afterok:7") == 3
    assert main(["submit", "pretrain", *RUN, "--executor=local", *wait]) == 2
    assert "--dependency need SLURM" in capsys.readouterr().err


def test_submit_without_slurm_is_refused(place, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "pretrain", *RUN]) == 2
    assert "this machine has no SLURM (sbatch, srun" in capsys.readouterr().err
    assert read_events(place / "run") == []
    assert main(["submit", "export"]) == 2
    assert main(["submit", "compare", "a", "b"]) == 2
    refused = capsys.readouterr().err
    assert "'export' cannot be submitted" in refused
    assert "; choose from pretrain, finetune, supervised, knn, linear-probe, evaluate, b" in refused


def test_job_imports_the_copied_code(place: Path) -> None:
    code = snapshot(place / "slurm")
    assert snapshot(place / "slurm") == code
    (place / "mae_et").mkdir()
    (place / "mae_et" / "__init__.py").write_text("raise SystemExit('edited after it was copied')")
    program = (
        "import mae_et, mae_et.benchmarks as benchmarks, finetune, slurm; "
        "from mae_et.config.files import find_config; "
        "print(mae_et.__file__, benchmarks.__file__, finetune.__file__, slurm.__file__, "
        "find_config('demo'))"
    )
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(code)) for path in done.stdout.split())


def test_edited_config_does_not_change_a_pending_job(place: Path) -> None:

    kept = freeze_configs(
        parse_task(COMMAND_LINE, "pretrain", ["--config", "tiny.yaml", "--seed=3"]),
        place / "run" / "slurm",
    )
    (place / "tiny.yaml").write_text("seed: 9")
    again = parse_task(COMMAND_LINE, "pretrain", kept.arguments)
    assert again.config.seed == 3
    assert again.config.model.encoder_embed_dim == 32


def test_follow_up_starts_from_the_run_and_its_data(place: Path) -> None:
    first = parse_task(COMMAND_LINE, "pretrain", [*RUN, "--data.synthetic_train=41"])
    (place / "recipe.yaml").write_text("model: {image_size: 32}")
    tuned = follow_up(first, "finetune=recipe.yaml")
    assert tuned.config.model.checkpoint == Path("run")
    assert tuned.config.data.synthetic_train == 41
    assert tuned.folder == Path("run/finetune")
    (place / "recipe.yaml").write_text("model: {image_size: 32}\ndata: {name: cifar10}")
    assert follow_up(first, "finetune=recipe.yaml").config.data.source == "cifar10"
    large = parse_task(
        COMMAND_LINE, "pretrain", ["--config=pretrain/vit_l16_etpp", "--data.root=/x"]
    )
    followed = follow_up(large, "finetune").config
    assert followed.optim.layer_decay == 0.75
    assert followed.data.root == Path("/x")
    with pytest.raises(UserError, match="'evaluate' cannot follow pretrain"):
        follow_up(first, "evaluate")


def test_sweep_has_a_run_for_each_combination(place: Path) -> None:
    first = parse_task(COMMAND_LINE, "pretrain", RUN)
    found = sweep_tasks(first, ["optim.base_lr=0.1,0.2", "seed=0,1,2"])
    assert len(found) == len({each.folder for each in found}) == 6
    assert found[-1].folder == Path("run/base_lr=0.2,seed=2")
    assert (found[-1].config.optim.base_lr, found[-1].config.seed) == (0.2, 2)
    lists = sweep_tasks(first, ["data.scale=[0.1,1],[0.2,1]"])
    assert [each.config.data.scale for each in lists] == [(0.1, 1.0), (0.2, 1.0)]
    with pytest.raises(UserError, match=r"optim\.base_lr"):
        sweep_tasks(first, ["optim.base_lr=0.1,fast"])


def test_sweep_table_accepts_names_with_commas(place: Path) -> None:
    from slurm.submission import _table

    found = sweep_tasks(
        parse_task(COMMAND_LINE, "pretrain", RUN), ["optim.base_lr=0.1,0.2", "seed=0,1"]
    )
    assert _table(Path("run"), [found]).config.runs == [each.folder for each in found]


@pytest.fixture
def inside(place: Path, monkeypatch) -> list[str]:
    """Pretend to be the batch script of a running job; return the requests to SLURM."""
    asked: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(retry, "is_running", lambda: True)
    monkeypatch.setattr(retry, "requeue", lambda: asked.append("requeue"))
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
    [(signal.SIGUSR2, 0.0, "failed"), (signal.SIGUSR2, 60.0, "requeued"),
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
    monkeypatch.setattr(signal, "raise_signal", lambda number: None)
    payload = job.Job(stopped, [], place / "run", limit=limit)
    with pytest.raises(RunFailed) if expected == "failed" else contextlib.nullcontext():
        payload()
    assert [event["event"] for event in read_events(place / "run")] == ["started", expected]


def test_crash_restarts_until_there_is_no_progress(place: Path, inside, monkeypatch) -> None:
    run = place / "run"
    steps = iter([100, 200, 200, 200])
    monkeypatch.setattr(retry, "read_progress", lambda folder: (next(steps), 0))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record_event(run, "requeued", step=50)  # of an earlier start: no crash
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for _ in range(4):
        record_event(run, "started")
        assert retry.main(run, 1, 2) == 1
    assert [event["event"] for event in read_events(run)[2::2]] == ["retried"] * 3 + ["given up"]
    assert read_events(run)[-1]["crashes"] == 3
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
    assert retry.main(place, watchdog.EXIT_STATUS, 3) == watchdog.EXIT_STATUS
    last = read_events(place)[-1]
    assert last["event"] == "retried"
    assert last["sentence"].startswith("no step or batch finished within step_timeout")


def test_succeeded_or_cancelled_job_is_not_restarted(place, inside, monkeypatch) -> None:
    assert retry.main(place, 0, 3) == 0
    monkeypatch.setattr(retry, "is_running", lambda: False)
    assert retry.main(place, 143, 3) == 143
    assert read_events(place) == []
    assert inside == []


def test_ranks_share_a_port_through_the_folder(place: Path, inside) -> None:
    port = job.shared_port(place, 0)
    assert 1024 <= port < 65536
    assert job.shared_port(place, 1) == port
    assert job.port_file(place).name == "port-7-2"


def test_stop_deadline_ends_a_blocked_process(place: Path) -> None:
    program = (
        "import ctypes, signal, sys; from slurm.stop_deadline import StopDeadline\n"
        "signal.signal(signal.SIGUSR2, lambda *_: print('handled'))\n"
        "with StopDeadline(0.5, lambda number: print('acted', number, flush=True)):\n"
        "    print('ready', flush=True)\n"
        "    while True: ctypes.CDLL(None).sleep(60)\n"
    )
    stuck = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert stuck.stdout is not None
    assert stuck.stdout.readline() == "ready\n"
    stuck.send_signal(signal.SIGUSR2)
    out, err = stuck.communicate(timeout=20)
    assert stuck.returncode == EXIT_STATUS
    assert f"acted {int(signal.SIGUSR2)}" in out
    assert "Thread" in err  # its stack


@pytest.mark.slow
def test_local_job_is_interrupted_resumes_and_shows_its_status(place: Path, capsys) -> None:
    flags = ["--curriculum.epochs=100", "--output.tensorboard=false", "--optim.base_lr=0.001"]
    assert main(["submit", "pretrain", *RUN, *flags, "--cluster=local"]) == 0
    pid = int(json.loads(capsys.readouterr().out.splitlines()[-1])["jobs"]["pretrain"])
    run, end = place / "run", time.monotonic() + 180

    def until(event: str, count: int) -> None:
        while sum(e["event"] == event for e in read_events(run)) < count:
            assert time.monotonic() < end, read_events(run)
            time.sleep(0.1)

    until("started", 1)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    (found,) = status([run])
    assert (found.state, found.job) == ("running", str(pid))
    assert (
        str(Path(f"/proc/{pid}/fd/1").readlink()) == os.devnull
    )  # `submit | cat` ends before the job
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGUSR2)
    until("finished", 1)
    assert [e["event"] for e in read_events(run)].count("requeued") == 1
    (found,) = status([run])
    assert (found.state, found.restarts, found.lost, found.error) == ("finished", 1, 0, "")


def test_status_needs_only_the_run_folder(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = place / "run"
    assert main(["pretrain", *RUN, "--output.tensorboard=false"]) == 0
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


def test_half_written_event_is_skipped(place: Path) -> None:
    record_event(place, "started", step=1)
    with (place / "slurm" / "events.jsonl").open("a") as file:
        file.write('{"event": "fin')
    assert [event["event"] for event in read_events(place)] == ["started"]


def test_comparison_shows_differing_keys(place: Path, capsys) -> None:
    for seed in (0, 1):
        flags = [f"--seed={seed}", f"--output.dir=r{seed}", "--output.tensorboard=false"]
        assert main(["pretrain", "--config=tiny.yaml", *flags]) == 0
    (place / "r0" / "knn").mkdir()
    (place / "r0" / "knn" / "results.json").write_text('{"knn": 31.5}')
    text = compare(CompareConfig([place / "r0", place / "r1"], place / "table.md"))
    assert (place / "table.md").read_text().strip() == text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")]
    head, _, first, second, _ = rows
    assert head[:2] == ["run", "seed"]
    assert (first[head.index("seed")], second[head.index("seed")]) == ("0", "1")
    assert (first[head.index("knn")], second[head.index("knn")]) == ("31.5", "")
    shutil.copytree(place / "r1", place / "a|b\nc")
    assert "| a\\|b c " in compare(CompareConfig([place / "r0", place / "a|b\nc"]))
    capsys.readouterr()
    assert main(["compare", "r0", "--output=r0"]) == 2
    assert capsys.readouterr().err == "mae-et: output r0 cannot be written to: Is a directory\n"
    assert main(["compare", "r0", "nowhere"]) == 2
    assert "there is no run folder nowhere" in capsys.readouterr().err


def test_job_is_requeued_by_its_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    scontrol = tmp_path / "scontrol"
    for status_of, queued in ((0, True), (1, False)):
        scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit {status_of}\n')
        scontrol.chmod(0o755)
        assert job.requeue() is queued
        assert (tmp_path / "asked").read_text() == "requeue 12\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert not job.requeue()


def test_search_trials_are_submitted_once_and_awaited(place: Path, monkeypatch, capsys) -> None:
    """The debug executor runs the jobs in this process."""
    monkeypatch.setattr(trials, "POLL_SECONDS", 0)
    (place / "here.yaml").write_text("executor: debug\n")
    runner = trials.ClusterRunner(COMMAND_LINE, "here.yaml", place / "search")
    one, other = (
        load_config(PretrainConfig, ["tiny.yaml"], [f"--output.dir=search/{n}"]) for n in (1, 2)
    )
    assert runner([one]) == [None]
    submitted: list[str] = []

    def fails(tasks, *_) -> str:
        submitted.extend(str(each.folder) for each in tasks)
        record_event(
            place / "search/2", "submitted", job="7", restart=0, kind="pretrain", executor="local"
        )
        record_event(
            place / "search/2", "failed", job="7", restart=0, kind=kind, sentence="the loss is nan"
        )
        return "7"

    monkeypatch.setattr(trials, "submit_together", fails)
    kind = "Diverged"
    assert runner([one, other]) == [None, "the loss is nan"]
    kind = "OutOfMemoryError"  # not an outcome: the search ends, and resumes when restarted
    with pytest.raises(RunFailed, match=r"search/2 ended before its run .failed.: the loss is"):
        runner([one, other])
    assert submitted == ["search/2"] * 2
    with pytest.raises(ValueError, match="runs to its end"):
        runner([one], 3)
