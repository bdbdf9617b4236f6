"""Submission without a cluster: scripts, copies, sweeps, local jobs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from natural_images import jpeg, natural
from submitit import DebugExecutor

from mae_et import RunFailed, UserError
from mae_et.cli.arguments import config_of
from mae_et.cli.main import main, run
from mae_et.config.files import load_config, to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.io.lock import sole_writer
from slurm import preflight, status, trials
from slurm.command import CommandLine, follow_up, freeze_configs, parse_task, sweep_tasks
from slurm.events import read_events, record_event
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


def test_training_that_requests_no_gpu_is_reported_and_the_lab_s_cluster_is_the_default(
    place: Path, monkeypatch, capsys
) -> None:
    def said(*flags: str) -> str:
        assert main(["submit", "pretrain", *RUN, *flags, "--dry-run"]) == 0
        return capsys.readouterr().err

    anywhere = "--efficiency.device=auto"
    assert "warning: pretrain requests no GPU: give --gpus_per_node" in said(anywhere)
    for flag in ("--gpus_per_node=1", "--extra={gres: 'gpu:a100:1'}", "--efficiency.device=cpu"):
        assert "requests no GPU" not in said(anywhere, flag)
    (place / "lab.yaml").write_text("gpus_per_node: 4")
    monkeypatch.setenv("MAE_ET_CLUSTER", "lab.yaml")
    assert "cluster: lab.yaml (MAE_ET_CLUSTER)" in (default := said(anywhere))
    assert "requests no GPU" not in default
    assert "requests no GPU" in said(anywhere, "--cluster=cpu")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("--sweep=curriculum.epochs=4.5,0.1", "epochs 0.1 leaves stage 1"),
     ("--curriculum.epochs=1e18", "curriculum.epochs 1e+18 is a budget of"),
     ("--optim.batch_size=48", "batch_size 48 is larger than the dataset of 40 images"),
     ("--gpus_per_node=5", "optim.batch_size 12 is not divisible by 5 ranks"),
     ("--output.dir=tiny.yaml/run", "output.dir tiny.yaml/run: Not a directory"),
     ("--output.dir=run%j", "contains %"),
     ("--optim.base_lr=fast", "optim.base_lr"),
     ("--then=finetune", "no recipe"),
     ("--cluster=nowhere", "there is no cluster 'nowhere'"),
     ("--time=soon", "time must read like"),
     ("--sweep=seed", "--sweep must read like"),
     ("--output.dir=a:b", "which SLURM or Python would misread"),
     ("--data.name=folder", "data.root is needed for data.name folder"),
     ("--data.name=shards", "data.root is needed for data.name shards")],
)  # fmt: skip
def test_what_the_run_would_refuse_is_refused(flag: str, sentence: str, place, capsys) -> None:
    """Also of one run of a sweep; the number of synthetic images is known."""
    assert main(["submit", "pretrain", *RUN, flag, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err
    assert list(place.iterdir()) == [place / "tiny.yaml"]


def test_plans_are_checked_against_the_images_of_a_folder_if_these_are_listed_in_time(
    place: Path, monkeypatch, capsys
) -> None:
    """Not if the job waits for another one, which may write them."""
    for number in range(4):
        for split in ("train", "val"):
            path = place / "few" / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(natural(9, 9, number)))
    few, wait = ["--data.root=few"], "--dependency=afterok:7"
    train = ["supervised", "--model.backbone=resnet18", "--optim.batch_size=8", *few]
    for command in (["pretrain", *RUN, *few], [*train, "--output.dir=run"]):
        assert main(["submit", *command, "--dry-run"]) == 2
        assert "larger than the dataset of 4 images: give a smaller one" in capsys.readouterr().err
        assert main(["submit", *command, "--dry-run", wait]) == 0
    release = threading.Event()
    monkeypatch.setattr(preflight, "LISTING_SECONDS", 0.01)
    monkeypatch.setattr(preflight, "open_dataset", lambda *_: release.wait(60) and [])
    monkeypatch.setattr(preflight, "_COUNTED", {})
    assert main(["submit", "pretrain", *RUN, *few, "--dry-run"]) == 0
    assert "few was not listed in 0.01 s: the plan is not checked" in capsys.readouterr().err
    release.set()


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
    [("--gpus", "did you mean --gpus_per_node?"), ("--clutser", "did you mean --cluster?"),
     ("--exclusive", "takes any option of sbatch")],
)  # fmt: skip
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
    tuned = parse_task(COMMAND_LINE, "finetune", ["runs/a", "--data.name=synthetic"])
    (place / "runs" / "a" / "slurm").mkdir(parents=True)  # the job that it waits for
    assert COMMAND_LINE.parse("finetune", tuned.arguments).output.dir == tuned.folder
    assert parse_task(COMMAND_LINE, "finetune", ["runs/a"]).folder == Path("runs/a/finetune")
    assert main(["submit", "finetune", "runs/a", folder, *wait]) == 0
    assert main(["submit", "pretrain", *RUN, "--executor=local", *wait]) == 2
    assert "--dependency need SLURM" in capsys.readouterr().err


def test_what_the_job_would_refuse_is_refused_before_it(place: Path, capsys) -> None:
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text((place / "tiny.yaml").read_text())
    (place / "x.pth").touch()
    for split in ("train", "val"):
        (place / "flat" / split / "a").mkdir(parents=True)
    scores = ["--cluster=local", "--data.root=flat", "--dry-run"]
    model = ["--optim.batch_size=8", "--output.dir=new", "--dry-run"]
    train = ["supervised", "--model.backbone=resnet18"]
    for words, sentence in (
        (["evaluate", "run", *scores], "run is a run of mae-et pretrain, which has no classifier"),
        (["evaluate", "x.pth", "--weights=best", *scores], "weights best needs"),
        (["evaluate", "x.pth", scores[0], scores[2]], "data must be given (--data.root"),
        (["evaluate", "resnet18", scores[0], scores[2]], "data must be given (--data.root"),
        (["knn", "vit_tiny_patch16_224", scores[0], scores[2]], "data must be given (--data.root"),
        (["finetune", "vit_tiny_patch16_224", *model], "data must be given (--data.root"),
        (["finetune", "--model.backbone=resnet18", *model], "data must be given (--data.root"),
        ([*train, "--data.name=cifar", *model], "'cifar' is unknown; known"),
        ([*train, "--data.root=x.pth", *model], "not a folder"),
        (["pretrain", *RUN, "--efficiency.micro_batch={9: 4}", *model], "batch names the band"),
        (["pretrain", *RUN, "--data.replay={9: 2}", *model], "data.replay names the bandwidths"),
        (["evaluate", "x.pth", *scores], "the val split of data.root flat has no classes"),
        (["knn", "run", *scores], "fewer than two class folders): knn needs train/CLASS/*"),
        (["bench", "node", "--model.encoder=vit_no_patch16", *model], "no model 'vit_no_patch16'"),
        (["supervised", "--model.backbone=resne18", *model], "'resne18'; did you mean resnet18"),
        (["pretrain", "--model.encoder=vit_no_patch16", *model], "has no model 'vit_no_patch16'"),
        ([*train, "--data.root=flat", *model], "supervised needs"),
    ):
        assert main(["submit", *words]) == 2, words
        assert sentence in capsys.readouterr().err
    assert main(["submit", *train, "--data.root=unmounted", *model]) == 2
    assert f"data.root unmounted is not a folder in {place}" in capsys.readouterr().err
    (place / "unmounted").mkdir()
    sweep = ["--data.root=unmounted", "--sweep=seed=0,1"]
    assert main(["submit", *train, *sweep, *model]) == 0
    assert capsys.readouterr().err.count("warning: unmounted is empty on this machine") == 1
    later = ["evaluate", "later", "--weights=best", "--executor=slurm", "--dependency=afterok:1"]
    assert main(["submit", *later, "--dry-run"]) == 0  # another job writes this run
    record_event(place / "later", "submitted", job="1")
    for name, text in (("config.yaml", "model: {backbone: resnet18}"), ("classes.json", "{}")):
        assert main(["submit", *later, "--dry-run"]) == 0, name
        (place / "later" / name).write_text(text)
    assert main(["submit", *later, "--dry-run"]) == 0  # it has started, and is not finished


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


def test_unexpected_output_of_sbatch_is_one_sentence(programs: Path, capsys) -> None:
    (programs / "sbatch").write_text("#!/bin/sh\necho queued\n")
    assert main(["submit", "pretrain", *RUN]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith('sbatch output "queued"; squeue shows whether there is a job')


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
        assert path.stat().st_mode & 0o022 == 0 or path.suffix in {".jsonl", ".out", ".err"}, path
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
