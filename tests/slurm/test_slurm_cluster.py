"""The test cluster behaves like a real one and leaves no processes behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster, ClusterError, missing_programs, start_cluster

from slurm import squeue
from slurm.squeue import JobState, job_states

MISSING = missing_programs()
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"SLURM's programs are not installed ({', '.join(MISSING)}): run make slurm-deps",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def overdue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    """A job on a second cluster with a limit of two seconds; SLURM checks limits every 30 s."""
    with start_cluster(tmp_path_factory.mktemp("overdue"), nodes=1) as started:
        job = started.submit("--output=/dev/null", "--time=60", "--wrap=sleep 300")
        started.wait_for_state(job, "RUNNING")
        started.run("scontrol", "update", f"JobId={job}", "EndTime=now+2seconds")
        yield started, job


def alive(processes: list[int]) -> list[int]:
    return [process for process in processes if Path(f"/proc/{process}").exists()]


def test_nodes_are_idle_with_the_simulated_cpus(cluster: Cluster) -> None:
    said = cluster.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T %c")
    assert said.splitlines() == [f"{name} idle 2" for name in cluster.nodes]


def test_job_runs_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = cluster.submit("--nodes=2", "--ntasks-per-node=2", f"--output={out}",
                         "--wrap=srun printenv SLURMD_NODENAME")  # fmt: skip
    cluster.wait_for_state(job, "COMPLETED")
    assert sorted(out.read_text().split()) == sorted(2 * cluster.nodes)


def test_impossible_job_is_rejected_with_a_reason(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="Node count specification invalid"):
        cluster.submit("--nodes=3", "--wrap=true")


def test_timeout_reports_the_queue_and_the_logs(cluster: Cluster) -> None:
    job = cluster.submit("--hold", "--job-name=held", "--wrap=true")
    with pytest.raises(ClusterError, match=rf"job {job} is RUNNING: not within 0.3 s") as error:
        cluster.wait_for_state(job, "RUNNING", seconds=0.1)
    cluster.run("scancel", job)
    assert "held" in str(error.value)
    assert f"submit_batch_job: JobId={job}" in str(error.value)


def test_queue_is_read_with_requeues_and_elements_of_arrays(cluster: Cluster, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    array = cluster.submit("--hold", "--array=0-1", "--output=/dev/null", "--wrap=true")
    job = cluster.submit("--output=/dev/null", "--wrap=sleep 300")
    cluster.wait_for_state(job, "RUNNING")
    cluster.run("scontrol", "requeue", str(job))
    cluster.wait_for_state(job, "PENDING")
    elements = [f"{array}_0", f"{array}_1"]
    held = JobState("PENDING", "JobHeldUser")
    requeued = JobState("PENDING", "BeginTime", 1)
    assert job_states([str(job), *elements]) == dict.fromkeys(elements, held) | {str(job): requeued}
    assert squeue._controller(str(job)) == requeued
    cluster.run("scancel", str(array), str(job))


def test_high_partition_requeues_a_job_of_a_low_one(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = ["--exclusive", "--nodes=2"]
    low = cluster.submit(*both, "--partition=low_nograce", "--open-mode=append",
                         f"--output={out}", "--wrap=echo $SLURM_RESTART_COUNT; sleep 300",
                         )  # fmt: skip
    cluster.wait_for_state(low, "RUNNING")
    high = cluster.submit(*both, "--partition=high", "--output=/dev/null", "--wrap=true")
    cluster.wait_for_state(high, "COMPLETED")
    assert (cluster.state(low), cluster.restart_count(low)) == ("PENDING", 1)
    cluster.start_now(low)
    cluster.wait_for_state(low, "RUNNING")
    cluster.wait_for(lambda: out.read_text().splitlines()[-1] == "1", "a second run")
    cluster.run("scancel", low)


def test_preempted_job_with_grace_time_receives_the_requested_signal(
    cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    both = ["--exclusive", "--nodes=2"]
    low = cluster.submit(*both, "--partition=low", "--signal=B:USR2@90", f"--output={out}",
                         "--wrap=trap 'echo signalled; exit 0' USR2; echo ready; sleep 300 & wait",
                         )  # fmt: skip
    cluster.wait_for(lambda: out.exists() and "ready" in out.read_text(), "the job's start")
    high = cluster.submit(*both, "--partition=high", "--output=/dev/null", "--wrap=true")
    cluster.wait_for_state(high, "COMPLETED")
    assert out.read_text().split()[:2] == ["ready", "signalled"]
    # A job that ends by itself is done: it has to requeue itself.
    assert (cluster.state(low), cluster.restart_count(low)) == ("COMPLETED", 0)


def test_submitit_runs_on_the_cluster(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="slurm")
    executor.update_parameters(nodes=2, tasks_per_node=1, timeout_min=60)
    job = executor.submit(os.getenv, "SLURMD_NODENAME")
    assert job.results() == list(cluster.nodes)


def test_simulated_gpus_are_visible_to_a_job(tmp_path: Path) -> None:
    with start_cluster(tmp_path, nodes=1, gpus=2) as cluster:
        out = tmp_path / "job"
        job = cluster.submit("--gpus-per-node=2", f"--output={out}",
                             "--wrap=srun printenv CUDA_VISIBLE_DEVICES")  # fmt: skip
        cluster.wait_for_state(job, "COMPLETED")
        assert out.read_text() == "0,1\n"


@pytest.mark.slow
def test_each_rank_takes_its_own_gpu(tmp_path: Path) -> None:
    """Whether SLURM exposes all GPUs of the node to it, or one."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, torch\n"
        "from mae_et.runtime.distributed import choose_device\n"
        "from slurm.job import set_rank_environment\n"
        "set_rank_environment(pathlib.Path(__file__).parent / os.environ['SLURM_STEP_ID'])\n"
        "seen = os.environ['CUDA_VISIBLE_DEVICES'].split(',')\n"
        "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: len(seen)\n"
        "print(len(seen), seen[choose_device().index], os.environ['LOCAL_RANK'])\n"
    )
    run = f"{sys.executable} {program}"
    out = tmp_path / "job"
    with start_cluster(tmp_path / "cluster", nodes=1, gpus=2) as cluster:
        cluster.environment["SUBMITIT_EXECUTOR"] = "slurm"
        job = cluster.submit("--ntasks=2", "--gpus-per-node=2", f"--output={out}",
                             f"--wrap=srun {run}; srun --gpus-per-task=1 {run}")  # fmt: skip
        cluster.wait_for_state(job, "COMPLETED", seconds=120)
    lines = out.read_text().splitlines()
    assert sorted(lines[:2]) == ["2 0 0", "2 1 1"]
    assert sorted(lines[2:]) == ["1 0 0", "1 1 1"]


def test_accounting_answers_sacct(tmp_path: Path) -> None:
    missing = missing_programs(accounting=True)
    if missing:
        pytest.skip(f"no programs for accounting ({', '.join(missing)}): run make slurm-deps")
    with start_cluster(tmp_path, nodes=1, accounting=True) as cluster:
        job = cluster.submit("--output=/dev/null", "--wrap=true")
        sacct = ["sacct", "--noheader", "--allocations", "--format=State", f"--jobs={job}"]
        cluster.wait_for(lambda: cluster.run(*sacct).strip() == "COMPLETED", "accounts of a job")


def test_stopped_cluster_leaves_no_process_of_a_job(tmp_path: Path) -> None:
    """Even if the job ignores signals, in its own session and environment."""
    script = "setsid env -i /bin/sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done'"
    out = tmp_path / "job"
    with start_cluster(tmp_path / "cluster") as cluster:
        cluster.submit("--nodes=2", f"--output={out}", f"--wrap=srun {script}")
        cluster.wait_for(lambda: out.exists() and out.read_text().count("\n") == 2, "both tasks")
        processes = cluster.processes()
        assert {int(task) for task in out.read_text().split()} < set(processes)
        cluster.stop()
        assert alive(processes) == []
        cluster.stop()
    assert not Path(cluster.environment["SLURM_CONF"]).parent.exists()
    assert (tmp_path / "cluster" / "slurmctld.log").exists()


def test_failure_inside_the_block_leaves_no_process(tmp_path: Path) -> None:
    processes: list[int] = []

    def interrupted() -> None:
        with start_cluster(tmp_path) as cluster:
            processes.extend(cluster.processes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(processes) > 5
    assert alive(processes) == []


def test_failed_start_reports_its_reason_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "slurmd"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho $PPID > {tmp_path}/supervisor\necho no luck >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    words = r"(?s)slurmd.* ended with 3.*no luck"
    with pytest.raises(ClusterError, match=words), start_cluster(tmp_path / "cluster"):
        pytest.fail("it started")
    supervisor = int((tmp_path / "supervisor").read_text())
    assert alive([supervisor]) == []
    assert "Running as primary" in (tmp_path / "cluster" / "slurmctld.log").read_text()


def test_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cluster, "PROGRAMS", ("sbatch", "no-such-program"))
    words = r"not installed \(no-such-program\)"
    with pytest.raises(ClusterError, match=words), start_cluster(tmp_path):
        pytest.fail("it started")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_cluster_started_by_hand_ends_with_its_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, slurm_cluster.__file__, f"--folder={tmp_path}"],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            variable, _, configuration = said.removeprefix("export ").strip().partition("=")
            environment = os.environ | {variable: configuration}
            job = subprocess.run(["srun", "echo", "hello"], env=environment, capture_output=True)
            assert job.stdout == b"hello\n", job.stderr
        finally:  # otherwise a failure would wait for it forever
            process.send_signal(number)
    # The supervisor removes it last, after all processes of the cluster have ended.
    end = time.monotonic() + 60
    while Path(configuration).parent.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert process.returncode == (-number if number == signal.SIGKILL else 0)


@pytest.mark.slow
def test_job_ends_at_its_time_limit(overdue: tuple[Cluster, str]) -> None:
    cluster, job = overdue
    cluster.wait_for_state(job, "TIMEOUT", seconds=45)
