"""Submit pre-training to SLURM from Python: three seeds, each probed when it ends.

python examples/submit_runs.py CLUSTER [--dry-run], where CLUSTER is your file
(configs/cluster/example.yaml) or a shipped name. --dry-run prints the scripts and submits nothing.
"""

import sys
from pathlib import Path

import mae_et
import slurm
from mae_et.cli.slurm_jobs import command_line


def submit(cluster: slurm.ClusterConfig, root: Path, dry_run: bool = False) -> list[Path]:
    """Submit the demo with three seeds, and return the run folders."""
    folders = [root / f"seed{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        flags = ["--config=demo", f"--seed={seed}", f"--output.dir={folder}"]
        slurm.submit(
            command_line(), "pretrain", flags, cluster, then=["linear-probe"], dry_run=dry_run
        )
    return folders


if __name__ == "__main__":
    name, *others = sys.argv[1:]
    file = name if Path(name).exists() else f"cluster/{name}"
    dry_run = others == ["--dry-run"]
    folders = submit(mae_et.load_config(slurm.ClusterConfig, file), Path("runs/seeds"), dry_run)
    if not dry_run:
        for run in slurm.status(folders):
            print(run.run, run.state, run.scores)
