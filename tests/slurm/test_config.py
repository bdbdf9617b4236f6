"""Cluster configs."""

from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.config.files import load_config
from slurm.config import ClusterConfig, job_name


def test_job_name_defaults_to_the_name_of_the_run_folder(tmp_path: Path) -> None:
    assert job_name(ClusterConfig(), tmp_path / "mine") == "mae-et-mine"
    assert job_name(ClusterConfig(name="x"), tmp_path) == "x"


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
        ("--gpus_per_node=a100:-1", "gpus_per_node must not be negative, got a100:-1"),
        ("--gpus_per_node=a100", "a number, or a type and a number such as a100:4, got a100"),
        ("--executor=local --nodes=2", "local runs on one machine"),
        ("--executor=debug --tasks_per_node=2", "debug runs one rank"),
        ("--retries=-1", "retries must not be negative"),
        ("--time=0", "at least a minute"),
        ("--time=2 --signal_delay=120", r"signal_delay 120 s leaves nothing of time 2 \(2 min\)"),
        ("--memory_gb=.inf", "memory_gb must be positive"),
        ("--extra={'array':2}", "extra has 'array', which mae-et sets itself"),
        ("--extra={'wait':true}", "extra has 'wait', which"),  # for the end of the job
    ],
)
def test_invalid_cluster_config_is_refused(flag: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(ClusterConfig, [], flag.split())
