"""Cores, threads and GPUs of a process, before PyTorch is loaded, which takes seconds."""

import os
import re
from pathlib import Path

MAX_WORKERS = 16
CORES_PER_WORKER = 4
"""On a CPU, training on an image takes several times as long as loading it."""
SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that fix the number of threads; torchrun sets the first one."""
NVIDIA = Path("/proc/driver/nvidia/gpus")
TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> set[int]:
    """Return the numbers of the CPU cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return set(affinity(0) if affinity else range(os.cpu_count() or 1))


def default_workers(cores: int, on_cpu: bool) -> int:
    """Return the loader processes of a rank with `cores`; `on_cpu`: on which it also computes."""
    return min(MAX_WORKERS, max(1, cores // CORES_PER_WORKER if on_cpu else cores))


def expected_threads(workers: int) -> int:
    """Return how many threads will compute beside loader processes, of the only rank.

    Without a number from the user, PyTorch starts one for each physical core.
    """
    for name in SET_BY_USER:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    cores = usable_cores()
    siblings = {_read(TOPOLOGY / f"cpu{core}/topology/thread_siblings_list") for core in cores}
    physical = len(cores) if "" in siblings else len(siblings)
    return max(1, min(physical, len(cores) - workers))


def expected_gpu() -> str | None:
    """Return the model of the GPU that CUDA will number 0, by the driver's files; None without one.

    CUDA_VISIBLE_DEVICES selects it, by number or by the start of a UUID. Its value is returned
    where the files do not say which model that is: of a slice of a GPU (MIG), and of several models
    by number, which CUDA sorts by speed.
    """
    gpus = []
    for path in NVIDIA.glob("*/information"):
        facts = dict(re.findall(r"^(.+?):\s*(.*?)\s*$", _read(path), re.MULTILINE))
        gpus.append((facts.get("GPU UUID", "?"), facts.get("Model", "GPU")))
    selected = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if selected.startswith("MIG-"):
        return f"GPU {selected}" if gpus else None
    if selected.isdecimal():
        models = {model for _, model in gpus if int(selected) < len(gpus)}
    elif selected.startswith("GPU-"):  # a driver that was not used yet writes ? for each digit
        models = {name for uuid, name in gpus if "?" in uuid or uuid.startswith(selected)}
    else:
        models = set()
    return f"GPU {selected}" if len(models) > 1 else next(iter(models), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
