"""Cluster configs."""

from pathlib import Path

from slurm.config import ClusterConfig, job_name


def test_job_name_defaults_to_the_name_of_the_run_folder(tmp_path: Path) -> None:
    assert job_name(ClusterConfig(), tmp_path / "mine") == "mae-et-mine"
    assert job_name(ClusterConfig(name="x"), tmp_path) == "x"
