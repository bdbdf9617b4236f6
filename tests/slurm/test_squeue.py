"""States of jobs and ranks of nodes, on a real SLURM."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing_programs, start_cluster

from slurm import squeue
from slurm.squeue import JobState, job_state, job_states

needs_slurm = pytest.mark.skipif(bool(missing_programs()), reason="no SLURM: run make slurm-deps")


def test_jobs_that_only_accounting_knows_are_read_from_sacct(monkeypatch) -> None:
    said = {"sacct": "7|COMPLETED\n8_1|CANCELLED by 1000\n8_1.batch|FAILED\n"}
    monkeypatch.setattr(squeue, "run_program", lambda program, *_: said.get(program))
    known = {"7": JobState("COMPLETED"), "8_1": JobState("CANCELLED")}
    assert job_states(["7", "8_1", "9"]) == known


def test_default_filters_of_a_user_hide_no_jobs(monkeypatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "long")
    assert "SQUEUE_" not in (squeue.run_program("env") or "")


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
    assert job_state(str(job)) == "PENDING"
    cluster.run("scancel", str(array), str(job))


@needs_slurm
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
