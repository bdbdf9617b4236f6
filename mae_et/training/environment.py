"""What a run is computed with: command, versions, device, and what `auto` chose."""

import os
import platform
import shlex
import socket
import sys
import time
from functools import cache
from typing import Any

import torch

from mae_et.runtime.commit import code_commit
from mae_et.training.run import Run

ENVIRONMENT = "environment.jsonl"
_commit = cache(code_commit)  # of the code that was loaded, whatever is checked out later


def describe_environment(run: Run) -> dict[str, Any]:
    """Return the facts of one start of a run; every value is JSON's.

    `commit` is None where there is none (`code_commit`); the digests of the code are always there.
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
        "short_attention": run.short_attention,
        "decode": run.provenance.get("decode"),
    }
