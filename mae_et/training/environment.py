"""What a run is computed with: command, versions, device, and what `auto` chose."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mae_et.training.run import Run

ENVIRONMENT = "environment.jsonl"


def describe_environment(run: Run) -> dict[str, Any]:
    """Return the facts of one start of a run; every value is JSON's.

    `commit` is that of the clone that the code runs from, with `+` after it where files are
    changed; None where there is none, as in a SLURM job's copy. The digests of the code are always
    there.
    """
    device = run.world.device
    return {
        "time": time.time(),
        "step": run.state.step,
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "commit": _commit(),
        **run.provenance.get("code", {}),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": run.world.size,
        "precision": str(run.dtype or torch.float32).removeprefix("torch."),
        "micro_batch": {str(size): count for size, count in run.micro_batch.items()},
        "compiled": run.compiled,
        "cuda_graphs": run.graphs is not None,
        "decode": run.provenance.get("decode"),
    }


@cache  # of the code that was loaded, whatever is checked out later
def _commit() -> str | None:
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return None
    try:
        commit = _git(clone, "rev-parse", "HEAD").strip()
        return commit + "+" * bool(_git(clone, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):  # no git, or a clone of another user
        return None


def _git(clone: Path, *words: str) -> str:
    command = ["git", "-C", str(clone), *words]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
