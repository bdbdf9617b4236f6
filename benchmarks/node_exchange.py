"""Measure how fast the GPUs of this machine all-reduce gradients."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mae_et.config.schema import PretrainConfig
from mae_et.models.mae import MaskedAutoencoder

ROUNDS, PATIENCE = 5, 90.0


def exchange_speed(
    config: PretrainConfig, device: torch.device, gpus: int
) -> dict[str, Any] | None:
    """Time the all-reduce of a recipe's gradients over the visible GPUs; None for a single one.

    Returns:
        `bytes` of the gradients, `seconds` per all-reduce, and `bus_bytes_per_second`: the rate at
        which each GPU sends and receives 2 (n - 1) / n times the bytes; `error` if it failed.
    """
    if gpus < 2:
        return None
    with torch.device("meta"):
        model = MaskedAutoencoder.from_config(config.model)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return all_reduce_speed(device.type, gpus, numbers)


def all_reduce_speed(kind: str, ranks: int, numbers: int) -> dict[str, Any]:
    """Time the all-reduce of float32 numbers over ranks, one process per rank."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store, result = Path(folder) / "store", Path(folder) / "seconds"
        processes = [
            context.Process(target=_rank, args=(rank, ranks, kind, numbers, store, result))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        ends = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
            process.kill()  # if still running
            process.join()
        if not result.exists():
            return {"ranks": ranks, "error": f"no sum within {PATIENCE:g} s; see the lines above"}
        seconds = float(result.read_text())
    volume = 4 * numbers
    bus = 2 * (ranks - 1) / ranks * volume / seconds
    return {"ranks": ranks, "bytes": volume, "seconds": seconds, "bus_bytes_per_second": bus}


def _rank(rank: int, ranks: int, kind: str, numbers: int, store: Path, result: Path) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    gradients = torch.zeros(numbers, device=device)
    taken = []
    for _ in range(2 + ROUNDS):
        before = time.perf_counter()
        dist.all_reduce(gradients)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - before)
    if rank == 0:
        result.write_text(str(sorted(taken[2:])[ROUNDS // 2]))
    dist.destroy_process_group()
