"""Start a command of mae-et on one rank or several."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_run import TINY


def start(
    folder: Path, processes: int, *flags: str, command: str = "pretrain", yaml: str = TINY
) -> subprocess.Popen:
    (folder / "tiny.yaml").write_text(yaml)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = ["-m", "mae_et", command, f"--config={folder / 'tiny.yaml'}",
               f"--output.dir={folder / str(processes)}", *flags]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else []), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(folder: Path, processes: int, *flags: str, **more: str) -> subprocess.CompletedProcess:
    process = start(folder, processes, *flags, **more)
    out, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


CLASSIFIER = """
model: {backbone: resnet10t, image_size: 32}
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 31}
curriculum: {preset: constant, epochs: 3, cost: area}
optim: {batch_size: 8, base_lr: 0.01}
recipe: {smoothing: 0.1, erasing: 0.25}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 1, evaluate_every: 50%, tensorboard: false}
"""
