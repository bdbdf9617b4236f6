"""Jobs on a real SLURM: interrupted in every way, they end like uninterrupted ones.

Each interrupted run is compared with an uninterrupted one: equal weights bit for bit, no metrics
row doubled.
"""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slurm_cluster import Cluster, start_cluster
from tiny_run import TINY

from mae_et import PretrainConfig, load_config, pretrain
from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint
from mae_et.cli.main import main
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime import watchdog
from slurm.events import read_events

# Long enough to interrupt, with rare checkpoints, so that repeated steps can be counted.
FLAGS = [
    "--curriculum.epochs=70", "--output.checkpoint_every=60", "--output.log_every=10",
    "--output.tensorboard=false", "--optim.base_lr=0.001",
]  # fmt: skip
CLUSTER = ["--nodes=2", "--cpus_per_task=1", "--partition=main", "--time=60"]


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path, monkeypatch) -> Path:
    """Change to a new folder, with SLURM's programs pointed to the test cluster."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def submit(place: Path, capsys) -> Callable[..., dict[str, str]]:
    """Submit a command line and return the jobs' ids by kind."""

    def run(*arguments: str) -> dict[str, str]:
        assert main(["submit", *arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])["jobs"]

    return run


@pytest.fixture
def start(submit, cluster: Cluster, place: Path) -> Callable[..., tuple[str, Path]]:
    """Submit the tiny pre-training; return its job and folder once it trains."""

    def run(*flags: str, name: str = "run") -> tuple[str, Path]:
        output = f"--output.dir={name}"
        job = submit("pretrain", "--config=tiny.yaml", output, *FLAGS, *CLUSTER, *flags)["pretrain"]
        cluster.wait_for(lambda: len(read_metrics(place / name)) > 2, "rows of metrics")
        return job, place / name

    return run


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory) -> Path:
    """Folder of the same run on as many ranks, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.chdir(folder)
        arguments = ["--config=tiny.yaml", "--output.dir=run", *FLAGS, *CLUSTER]
        assert main(["submit", "pretrain", *arguments]) == 0
        results = folder / "run" / "results.json"
        cluster.wait_for(results.exists, "the end of the run", 120)
    return results.parent


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == kind]


def processes_of(folder: Path) -> list[int]:
    """Return the ranks of a job by their command lines, sorted by process id."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        ours = "submitit.core._submit" in words and str(folder / "slurm") in words
        if ours and "python" in words[0]:
            found.append(int(path.parent.name))
    return sorted(found)


def same_end(cluster: Cluster, job: str, folder: Path, whole: Path) -> None:
    cluster.wait_for((folder / "results.json").exists, "the end of the run", 120)
    cluster.wait_for_state(job, "COMPLETED")
    ours, theirs = (newest_checkpoint(run / "checkpoints") for run in (folder, whole))
    assert ours["step"] == theirs["step"]
    for name, weight in theirs["model"].items():
        assert torch.equal(ours["model"][name], weight), name
    steps = [row["step"] for row in read_metrics(folder)]
    assert steps == sorted(set(steps))
    # A resumed run has an extra row where it stopped: compare rows of equal windows only.
    ours, theirs = (
        {(row["step"], row["window_steps"]): row["loss"] for row in read_metrics(run)}
        for run in (folder, whole)
    )
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= len(theirs) - 10
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


def test_two_nodes_train_to_the_losses_of_one_rank(uninterrupted: Path, place: Path) -> None:
    one = pretrain(load_config(PretrainConfig, ["tiny.yaml"], [*FLAGS, "--output.dir=one"]))
    assert len({event["node"] for event in events(uninterrupted, "started")}) == 1
    logs = sorted(path.name[-9:] for path in (uninterrupted / "slurm").glob("*_log.err"))
    assert logs == ["0_log.err", "1_log.err"]
    for ours, theirs in zip(read_metrics(uninterrupted), read_metrics(one), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "rank", "partition"),
    [("USR2", 0, "low_nograce"), pytest.param("TERM", 1, "low", marks=pytest.mark.slow)],
)
def test_a_run_that_is_signalled_killed_and_preempted_ends_like_an_uninterrupted_one(
    start, cluster: Cluster, uninterrupted: Path, name: str, rank: int, partition: str
) -> None:
    """Only the killed rank repeats steps, those since the last checkpoint."""
    job, folder = start(f"--partition={partition}", "--extra={exclusive: true}", "--then=knn")
    cluster.run("scancel", f"--signal={name}", job)
    cluster.restart_soon(job)
    cluster.wait_for(lambda: read_metrics(folder)[-1]["step"] > 60, "a step after a checkpoint")
    os.kill(processes_of(folder)[rank], signal.SIGKILL)
    cluster.restart_soon(job, 2)
    cluster.wait_for(lambda: len(events(folder, "started")) == 3, "the third start")
    rows = len(read_metrics(folder))
    cluster.wait_for(lambda: len(read_metrics(folder)) > rows, "rows of metrics")
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    cluster.restart_soon(job, 3)
    assert cluster.wait_for_state(other, "COMPLETED") == "COMPLETED"
    same_end(cluster, job, folder, uninterrupted)
    # The follow-up waited for the last end.
    cluster.wait_for((folder / "knn" / "results.json").exists, "the score")
    requeued, *_ = events(folder, "requeued")  # with grace, a preempted run requeues itself too
    (retried,) = events(folder, "retried")
    assert "Killed" in retried["sentence"]
    first, signalled, killed, preempted = events(folder, "started")
    assert first["step"] == 0
    assert signalled["step"] == requeued["step"] > 0
    assert killed["step"] == retried["step"] >= 60
    assert killed["step"] % 60 == 0
    assert preempted["step"] > killed["step"]
    assert 0 <= killed["lost"] < 60
    assert first["lost"] == signalled["lost"] == preempted["lost"] == 0
    # By the killed rank's peer.
    assert {event["restart"] for event in events(folder, "failed")} <= {1}


@pytest.mark.slow
def test_time_limit_saves_and_requeues_without_repeated_steps(start, cluster: Cluster) -> None:
    """SLURM checks time limits every 30 s, during which the job trains."""
    job, folder = start("--curriculum.epochs=1000", "--signal_delay=60", "--nodes=1")
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+62seconds")
    cluster.restart_soon(job)
    (requeued,) = events(folder, "requeued")
    cluster.wait_for(lambda: len(events(folder, "started")) == 2, "the second start")
    assert requeued["signal"] == signal.SIGUSR2
    assert events(folder, "started")[1]["step"] == requeued["step"]
    assert events(folder, "started")[1]["lost"] == 0
    cluster.run("scancel", job)


@pytest.mark.slow
def test_crash_restarts_up_to_the_limit_and_its_reason_is_kept(
    submit, cluster: Cluster, place: Path, capsys
) -> None:
    for name in ("train/a/1.png", "train/a/2.png"):
        (place / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "data" / name).write_bytes(b"no image")
    flags = ["--data.root=data", "--optim.batch_size=2", "--retries=1", "--output.dir=run"]
    job = submit("pretrain", "--config=tiny.yaml", *FLAGS, *CLUSTER, *flags)["pretrain"]
    cluster.restart_soon(job)
    assert cluster.wait_for_state(job, "FAILED") == "FAILED"
    run = place / "run"
    assert [len(events(run, kind)) for kind in ("started", "retried", "given up")] == [2, 1, 1]
    assert main(["status", "run", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["restarts"]) == ("failed", 1)
    assert "1.png" in found["error"] or "2.png" in found["error"]


def test_user_error_inside_the_job_is_not_retried(submit, cluster: Cluster, place: Path) -> None:
    flags = ["--data.root=/nowhere", "--output.dir=run", "--nodes=1", "--then=knn"]
    jobs = submit("pretrain", "--config=tiny.yaml", *FLAGS, *CLUSTER, *flags)
    assert cluster.wait_for_state(jobs["pretrain"], "FAILED") == "FAILED"
    # Its follow-up does not stay pending.
    assert cluster.wait_for_state(jobs["knn"], "CANCELLED") == "CANCELLED"
    assert events(place / "run", "retried") == []
    (given_up,) = events(place / "run", "given up")
    assert "nowhere" in given_up["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_failed_node_repeats_only_the_steps_since_the_last_checkpoint(
    start, uninterrupted: Path, tmp_path: Path, monkeypatch, node: int
) -> None:
    """A third node replaces it; the first node also runs the batch script."""
    with start_cluster(tmp_path / "cluster", nodes=3) as three:
        monkeypatch.setenv("SLURM_CONF", three.environment["SLURM_CONF"])
        job, folder = start()
        three.wait_for(lambda: list_checkpoints(folder / "checkpoints"), "a checkpoint")
        name = three.nodes[node]
        for process in three.processes_on(name):
            os.kill(process, signal.SIGKILL)
        # Instead of waiting minutes until SLURM declares a silent node failed.
        three.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=failed")
        three.restart_soon(job)
        same_end(three, job, folder, uninterrupted)
        assert name not in three.run("scontrol", "show", "hostnames", three.show(job)["NodeList"])
    _, second = events(folder, "started")
    assert second["step"] >= 60
    assert second["step"] % 60 == 0
    assert 0 <= second["lost"] < 60


@pytest.mark.parametrize("allowed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_run_requeues_up_to_the_allowed_number_of_time_limits(
    start, cluster: Cluster, capsys, allowed: int
) -> None:
    """Submitit counts every signal to a job of less than ten minutes as a time limit."""
    limits = ["--time=5", f"--timeouts={allowed}"]
    job, folder = start("--curriculum.epochs=1000", "--nodes=1", *limits)
    for restart in range(allowed):
        cluster.run("scancel", "--signal=USR2", job)
        cluster.restart_soon(job, restart + 1)
        step = len(read_metrics(folder))
        cluster.wait_for(lambda step=step: len(read_metrics(folder)) > step + 2, "rows of metrics")
    cluster.run("scancel", "--signal=USR2", job)
    assert cluster.wait_for_state(job, "FAILED") == "FAILED"
    assert cluster.restart_count(job) == allowed
    assert read_events(folder)[-1]["event"] == "given up"
    saved = newest_checkpoint(folder / "checkpoints")
    assert saved["step"] == read_events(folder)[-1]["step"]
    assert main(["status", "run", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["restarts"]) == ("failed", allowed)
    assert "timed-out too many times" in found["error"]


@pytest.mark.slow
def test_hung_rank_is_ended_after_a_signal_and_the_run_resumes(
    start, cluster: Cluster, uninterrupted: Path
) -> None:
    """Its peer waits for it in a collective, where no signal handler runs."""
    job, folder = start("--signal_delay=10")
    cluster.wait_for(lambda: list_checkpoints(folder / "checkpoints"), "a checkpoint")
    os.kill(processes_of(folder)[1], signal.SIGSTOP)
    time.sleep(1)
    cluster.run("scancel", "--signal=USR2", job)
    cluster.restart_soon(job)
    same_end(cluster, job, folder, uninterrupted)
    assert "the process hung" in events(folder, "failed")[0]["sentence"]


# Imported at interpreter start-up: one rank of the job's first start hangs in a step.
HANGS_ONCE = """
import os, sys
first = "SLURM_RESTART_COUNT" not in os.environ and "submitit.core._submit" in sys.orig_argv
if first and os.environ.get("SLURM_PROCID") == "{rank}":
    sys.path.append("{faults}")
    import driver
    driver.FAULTS["hang"](step="{step}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_finishes_no_step_ends_and_the_job_restarts(
    start, cluster: Cluster, uninterrupted: Path, place: Path, rank: int
) -> None:
    """It hangs in C without a signal; its peer waits in a collective until its own timeout.

    Both print their stacks, the job ends with status 75 and resumes from its last checkpoint.
    """
    step, faults = 100, Path(__file__).parents[1] / "robustness" / "faults"
    (place / "fault").mkdir()
    text = HANGS_ONCE.format(rank=rank, faults=faults, step=step)
    (place / "fault" / "sitecustomize.py").write_text(text)
    setup = f"--setup=['export PYTHONPATH={place / 'fault'}:$PYTHONPATH']"
    # Ranks also wait for each other so long at the start, where a busy machine delays one of them.
    job, folder = start(setup, "--efficiency.step_timeout=30")
    cluster.restart_soon(job)
    same_end(cluster, job, folder, uninterrupted)
    logs = [(folder / "slurm" / f"{job}_{number}_log.err").read_text() for number in (0, 1)]
    for number, log in enumerate(logs):
        assert f"rank {number} finished no step or batch in 30 s (step_timeout)" in log
        assert ("in struck" in log) == (number == rank)  # where it hangs
    # srun kills the task that exits later, if it does not exit in time itself.
    assert f"Exited with exit code {watchdog.EXIT_STATUS}" in logs[0]
    (retried,) = events(folder, "retried")
    assert "no step or batch finished within step_timeout" in retried["sentence"]
    _, second = events(folder, "started")
    assert (retried["step"], second["step"], second["lost"]) == (60, 60, step - 60)


def test_active_job_is_not_submitted_again_and_saves_when_cancelled(
    start, cluster: Cluster, capsys
) -> None:
    job, folder = start("--curriculum.epochs=1000", "--nodes=1")
    run = ["pretrain", "--config=tiny.yaml", f"--output.dir={folder.name}", *FLAGS, *CLUSTER]
    assert main(["submit", *run, "--curriculum.epochs=1000"]) == 2
    assert f"already has job {job}" in capsys.readouterr().err
    cluster.run("scancel", job)
    assert cluster.wait_for_state(job, "CANCELLED") == "CANCELLED"
    cluster.wait_for(lambda: events(folder, "stopped"), "the run to have saved")
    time.sleep(1)
    assert cluster.restart_count(job) == 0
    saved = newest_checkpoint(folder / "checkpoints")
    assert saved["step"] == events(folder, "stopped")[0]["step"]


@pytest.mark.slow
def test_sweep_runs_as_an_array_and_ends_with_a_table(
    submit, cluster: Cluster, place: Path, capsys
) -> None:
    """Its probes follow; a run that is submitted again ends at once."""
    run = ["pretrain", "--config=tiny.yaml", "--nodes=1", "--time=10"]
    jobs = submit(*run, "--output.dir=sweep", "--sweep=optim.base_lr=0.01,0.02", "--then=knn")
    assert set(jobs) == {"pretrain", "knn", "compare"}

    def statuses(run: Path) -> dict[str, dict[str, Any]]:
        assert main(["status", str(run), "--json"]) == 0
        return {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}

    sweep, first = place / "sweep", place / "sweep" / "base_lr=0.01"
    cluster.wait_for(lambda: statuses(first)["knn"]["reason"] == "Dependency", "a pending probe")
    cluster.wait_for((sweep / "results.md").exists, "the table", 120)
    rows = (sweep / "results.md").read_text().splitlines()
    head = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert head[:2] == ["run", "optim.base_lr"]
    assert "kNN (%)" in head
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]
    assert [row[1] for row in cells] == ["0.01", "0.02"]
    losses = [json.loads((sweep / row[0] / "results.json").read_text()) for row in cells]
    assert [row[head.index("loss")] for row in cells] == [f"{x['loss']:.4g}" for x in losses]
    assert len({row[head.index("loss")] for row in cells}) == 2

    def all_finished() -> bool:
        """Return whether SLURM has noticed that all jobs ended; it may lag behind their files."""
        states = {row["state"] for row in (statuses(sweep) | statuses(first)).values()}
        assert states <= {"finished", "running"}
        return states == {"finished"}

    cluster.wait_for(all_finished, "the jobs to end", 60)
    assert main(["status", str(first)]) == 0
    assert "25/25" in capsys.readouterr().out
    before = (first / "metrics.jsonl").read_bytes()
    job = submit(*run, "--optim.base_lr=0.01", f"--output.dir={first}")["pretrain"]
    assert cluster.wait_for_state(job, "COMPLETED") == "COMPLETED"
    assert (first / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("--partition=nowhere", "invalid partition"), ("--nodes=4", "SLURM refuses the job"),
     ("--output.dir=/proc/run", "cannot be written to")],  # not even by root
)  # fmt: skip
def test_invalid_submission_is_refused_before_submitting(
    place: Path, cluster: Cluster, capsys, flag: str, sentence: str
) -> None:
    jobs = ["squeue", "--noheader", "--states=all", "--format=%i"]
    before = set(cluster.run(*jobs).split())
    run = ["pretrain", "--config=tiny.yaml", "--output.dir=run"]
    assert main(["submit", *run, *CLUSTER, flag]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.lower() in said.lower()
    assert len(said) < 400
    assert set(cluster.run(*jobs).split()) <= before  # SLURM forgets old ones
    assert list(itertools.chain(place.rglob("*_submission.sh"), place.rglob("*.pkl"))) == []
