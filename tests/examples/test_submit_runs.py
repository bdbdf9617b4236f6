import runpy
from pathlib import Path

import pytest

from mae_et import load_config
from slurm import ClusterConfig

SCRIPT = Path(__file__).parents[2] / "examples" / "submit_runs.py"


def test_each_seed_is_pre_trained_and_probed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = load_config(ClusterConfig, "cluster/node_8gpu")
    runpy.run_path(str(SCRIPT))["submit"](cluster, tmp_path, dry_run=True)
    shown = capfd.readouterr().out
    assert shown.count("#SBATCH --nodes=1") == 6
    assert [f"\nseed: {seed}\n" in shown for seed in range(3)] == [True] * 3
