"""What a submission refuses or reports before it asks SLURM."""

import threading
from pathlib import Path

import pytest
from natural_images import jpeg, natural

from mae_et.cli.commands import config_of
from mae_et.cli.main import main, run
from slurm import preflight
from slurm.command import CommandLine, parse_task, sweep_tasks
from slurm.events import record_event

COMMAND_LINE = CommandLine(config_of, run)
RUN = ["--config=tiny.yaml", "--output.dir=run"]


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
    assert (
        main(
            [
                "submit",
                "pretrain",
                *RUN,
                "--data.synthetic_train=2000",
                "--then=finetune",
                "--dry-run",
            ]
        )
        == 0
    )
    assert "no recipe for 'vit_tiny_patch16_224', so its defaults" in capsys.readouterr().err


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
