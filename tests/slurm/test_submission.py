"""Submission without a cluster: scripts, copies, sweeps, local jobs."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from submitit import DebugExecutor, Job

from mae_et import RunFailed, UserError
from mae_et.cli.commands import config_of
from mae_et.cli.main import main, run
from mae_et.config.files import load_config, to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.io.lock import sole_writer
from slurm import status, trials
from slurm.command import CommandLine, follow_up, freeze_configs, parse_task, sweep_tasks
from slurm.events import read_events, record_event
from slurm.launcher import Launcher
from slurm.private import current_umask
from slurm.snapshot import snapshot

COMMAND_LINE = CommandLine(config_of, run)
RUN = ["--config=tiny.yaml", "--output.dir=run"]


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


def test_a_sweep_over_branches_starts_each_from_the_run(place: Path) -> None:
    (place / "t1").mkdir()
    (place / "t1" / "config.yaml").write_text(to_yaml(config_of("pretrain", RUN)))
    first = parse_task(COMMAND_LINE, "pretrain", ["--branch-from=t1", "--output.dir=cool"])
    found = sweep_tasks(first, ["optim.decay_fraction=0.1,0.2"])
    assert [run.start for run in found] == [Path("t1")] * 2
    assert [run.config.optim.decay_fraction for run in found] == [0.1, 0.2]
    assert [run.folder for run in found] == [Path(f"cool/decay_fraction={n}") for n in (0.1, 0.2)]
    assert found[0].config.model == config_of("pretrain", RUN).model


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


@pytest.fixture
def programs(place: Path, monkeypatch) -> Path:
    """Put fake SLURM programs first in PATH, and return their folder; sbatch logs its variables."""
    folder = place / "bin"
    folder.mkdir()
    for name in ("srun", "squeue", "scontrol", "scancel", "sacct", "sbatch"):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.log\n')
        (folder / name).chmod(0o755)
    with (folder / "sbatch").open("a") as sbatch:
        sbatch.write(f"env > {folder}/variables\necho Submitted batch job 7\n")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def test_job_inherits_the_cluster_but_not_the_job_that_submits_it(
    programs: Path, monkeypatch
) -> None:
    """Nor does a variable override the script, as sbatch prefers variables to it."""
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "lab", "SBATCH_GRES": "x:1"}
    dropped = {
        "SLURM_ARRAY_JOB_ID": "3", "SLURM_MEM_PER_CPU": "9", "SLURM_RESTART_COUNT": "1",
        "RANK": "0", "SBATCH_PARTITION": "long", "SBATCH_TIMELIMIT": "7", "SBATCH_WAIT": "1",
        "SBATCH_NO_REQUEUE": "1", "SBATCH_JOB_NAME": "x", "SBATCH_MEM_PER_NODE": "9",
    }  # fmt: skip
    for name, value in (kept | dropped).items():
        monkeypatch.setenv(name, value)
    assert main(["submit", "pretrain", *RUN, "--partition=gpu", "--memory_gb=1"]) == 0
    lines = (programs / "variables").read_text().splitlines()
    assert {f"{name}={value}" for name, value in kept.items()} <= set(lines)
    assert dropped.keys() & {line.partition("=")[0] for line in lines} == set()
    assert os.environ["SLURM_ARRAY_JOB_ID"] == "3"


@pytest.mark.parametrize(
    ("status", "sentence"), [(0, "was cancelled"), (1, "cancel it with scancel 7")]
)
def test_chain_that_slurm_refuses_halfway_is_cancelled(
    programs: Path, capsys, status: int, sentence: str
) -> None:
    """A busy controller may refuse any of its jobs."""
    with (programs / "sbatch").open("a") as sbatch:
        sbatch.write(f'[ "$1" = --test-only ] || [ $(wc -l < {programs}/sbatch.log) -lt 4 ]\n')
    with (programs / "scancel").open("a") as scancel:
        scancel.write(f"exit {status}\n")
    assert main(["submit", "pretrain", *RUN, "--then=knn"]) == 2
    shown = capsys.readouterr()
    assert "SLURM refuses the job" in shown.err
    assert sentence in shown.err
    assert shown.out == ""
    assert (programs / "scancel.log").read_text() == "7\n"


def test_of_two_submissions_at_once_the_second_is_refused(
    programs: Path, monkeypatch, capfd
) -> None:
    """Both have found the folder free."""

    def submit_another(launcher: Launcher) -> list[Job[None]]:
        monkeypatch.setattr(Launcher, "submit", submit)
        context = multiprocessing.get_context("fork")
        other = context.Process(target=lambda: sys.exit(main(["submit", "pretrain", *RUN])))
        other.start()
        other.join()
        statuses.append(other.exitcode)
        return submit(launcher)

    statuses: list[int | None] = []
    submit = Launcher.submit
    monkeypatch.setattr(Launcher, "submit", submit_another)
    assert main(["submit", "pretrain", *RUN]) == 0
    assert statuses == [2]
    assert "another process is writing to the job files in run/slurm\n" in capfd.readouterr().err
    assert (programs / "sbatch.log").read_text().count("--test-only") == 2
    assert len((programs / "sbatch.log").read_text().splitlines()) == 3


def test_unexpected_output_of_sbatch_is_one_sentence(programs: Path, capsys) -> None:
    (programs / "sbatch").write_text("#!/bin/sh\necho queued\n")
    assert main(["submit", "pretrain", *RUN]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith('sbatch output "queued"; squeue shows whether there is a job')


def test_job_imports_the_copied_code_and_knows_its_commit(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("slurm.snapshot.code_commit", lambda: "a1b2+")
    code = snapshot(place / "slurm")
    assert snapshot(place / "slurm") == code
    (place / "mae_et").mkdir()
    (place / "mae_et" / "__init__.py").write_text("raise SystemExit('edited after it was copied')")
    program = (
        "import mae_et, mae_et.benchmarks as benchmarks, finetune, slurm; "
        "from mae_et.config.shipped import find_config; "
        "from mae_et.runtime.commit import code_commit; "
        "print(mae_et.__file__, benchmarks.__file__, finetune.__file__, slurm.__file__, "
        "find_config('demo'), code_commit())"
    )
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    *paths, commit = done.stdout.split()
    assert all(path.startswith(str(code)) for path in paths)
    assert commit == "a1b2+"


def test_a_lab_s_umask_holds_for_the_run_but_not_for_pickles_and_code(
    place: Path, monkeypatch
) -> None:
    pickled: list[int] = []
    submit = DebugExecutor.submit
    monkeypatch.setattr(
        DebugExecutor, "submit", lambda *job: pickled.append(current_umask()) or submit(*job)
    )
    kept = os.umask(0o002)
    try:
        assert main(["submit", "pretrain", *RUN, "--executor=debug"]) == 0
        pickled.append(current_umask())  # of the caller
    finally:
        os.umask(kept)
    assert pickled == [0o022, 0o002]
    for path in (place / "run" / "slurm").rglob("*"):
        written = path.suffix in {".jsonl", ".out", ".err"} or path.name == ".lock"
        assert path.stat().st_mode & 0o022 == 0 or written, path
    assert (place / "run" / "results.json").stat().st_mode & 0o022 == 0o020


def test_edited_config_does_not_change_a_pending_job(place: Path) -> None:
    task = parse_task(COMMAND_LINE, "pretrain", ["--config", "tiny.yaml", "--seed=3"])
    kept = freeze_configs(task, place / "run" / "slurm")
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
    probed = follow_up(first, "finetune=finetune/vit_b16_linear")
    assert probed.folder == probed.config.output.dir == Path("run/finetune-linear")
    (place / "recipe.yaml").write_text("model: {image_size: 32}\ndata: {name: cifar10}")
    assert follow_up(first, "finetune=recipe.yaml").config.data.source == "cifar10"
    large = ["--config=pretrain/vit_l16_etpp", "--data.root=/x"]
    followed = follow_up(parse_task(COMMAND_LINE, "pretrain", large), "finetune").config
    assert followed.optim.layer_decay == 0.75
    assert followed.data.root == Path("/x")
    with pytest.raises(UserError, match=r"'evaluate' cannot follow pretrain; choose .*knn"):
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

    first = parse_task(COMMAND_LINE, "pretrain", RUN)
    found = sweep_tasks(first, ["optim.base_lr=0.1,0.2", "seed=0,1"])
    compare = _table(Path("run"), [found])
    assert compare.config.runs == [each.folder for each in found]
    assert compare.is_single


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
    # `submit | cat` ends before the job.
    assert str(Path(f"/proc/{pid}/fd/1").readlink()) == os.devnull
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGUSR2)
    until("finished", 1)
    assert [e["event"] for e in read_events(run)].count("requeued") == 1
    starts = [json.loads(row)["command"] for row in (run / "environment.jsonl").open()]
    assert len(starts) == 2
    assert all(command.startswith("mae-et pretrain ") for command in starts)
    (found,) = status([run])
    assert (found.state, found.restarts, found.lost, found.error) == ("finished", 1, 0, "")


def test_search_trials_are_submitted_once_and_awaited(place: Path, monkeypatch) -> None:
    """The debug executor runs the jobs in this process."""
    monkeypatch.setattr(trials, "POLL_SECONDS", 0)
    (place / "here.yaml").write_text("executor: debug\n")
    runner = trials.ClusterRunner(COMMAND_LINE, "here.yaml", place / "search")
    one, other = (
        load_config(PretrainConfig, ["tiny.yaml"], [f"--output.dir=search/{n}"]) for n in (1, 2)
    )
    assert runner([one]) == [None]
    assert read_events(place / "search/1")[0]["job"]
    submitted: list[str] = []

    def fails(tasks, *_) -> str:
        submitted.extend(str(each.folder) for each in tasks)
        about = {"job": "7", "restart": 0}
        record_event(place / "search/2", "submitted", **about, kind="pretrain", executor="local")
        record_event(place / "search/2", "failed", **about, kind=kind, sentence="the loss is nan")
        return "7"

    monkeypatch.setattr(trials, "submit_together", fails)
    kind = "Diverged"
    assert runner([one, other]) == [None, "the loss is nan"]
    kind = "OutOfMemoryError"  # not an outcome: the search ends, and resumes when restarted
    with pytest.raises(RunFailed, match=r"search/2 ended before its run .failed.: the loss is"):
        runner([one, other])
    assert submitted == ["search/2"] * 2
    record_event(place / "search/3", "started", job="8", restart=0)
    with sole_writer(place / "search/3"):  # its job outlived an earlier search
        assert runner._is_there(place / "search/3")
    with pytest.raises(ValueError, match="runs to its end"):
        runner([one], 3)
