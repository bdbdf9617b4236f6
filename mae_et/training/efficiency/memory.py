"""Measure available memory, and the peak memory of a piece of work."""

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_et.errors import RunFailed
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.host_memory import available_host_memory
from mae_et.runtime.system_errors import is_out_of_gpu_memory
from mae_et.runtime.watchdog import heartbeat

OTHERS_BYTES = 2 * 2**30
"""Tolerated GPU memory of others than torch: more than the CUDA context of one process."""


def available_memory(world: DistributedContext) -> int:
    """Return the bytes that this rank may still allocate.

    On a GPU: free memory, and memory that torch has reserved but not allocated. On a CPU: the
    kernel's estimate (MemAvailable in /proc/meminfo), limited by control groups and divided by the
    number of ranks on this machine.
    """
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        held = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return free + held
    available = available_host_memory()
    if available is None:
        raise RunFailed("efficiency.micro_batch auto needs /proc/meminfo; give a number")
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def wait_for_other_processes(world: DistributedContext, seconds: float = 30) -> bool:
    """Wait while other processes hold memory of this rank's GPU; return whether they still do.

    Loader processes of a killed run hold its memory for some seconds; without waiting, a run
    restarted at once would fit its micro-batches to the rest.
    """
    if world.device.type != "cuda":
        return False
    end = time.monotonic() + seconds
    said = False
    while (held := _held_by_others(world.device)) > OTHERS_BYTES:
        if not said:
            amount = f"{held / 2**30:.1f} GiB of the memory of GPU {world.device.index}"
            say(f"other processes hold {amount}; waiting up to {seconds:g} s for them")
            said = True
        if time.monotonic() >= end:
            return True
        time.sleep(min(1.0, seconds))
    return False


def _held_by_others(device: torch.device) -> int:
    """Return the bytes of GPU memory that are neither free nor reserved by torch here."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def peak_of(work: Callable[[], None], device: torch.device) -> int | None:
    """Return the peak memory of tensors made in `work`, in bytes; None if memory ran out."""
    heartbeat()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            work()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        except RuntimeError as error:  # cuBLAS and cuDNN raise no OutOfMemoryError
            if not is_out_of_gpu_memory(error):
                raise
            return None
        finally:
            torch.cuda.reset_peak_memory_stats(device)
    with _Allocations() as allocations:
        work()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Count the bytes of live tensors made by operators.

    Unlike the size of the process, this depends neither on the allocator's cache nor on other
    programs: equal passes give equal counts. Scratch memory inside an operator is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        known = {self._key(leaf) for leaf in tree_leaves((arguments, keywords))}
        result = operator(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            key = self._key(leaf)
            if key is None or key in known or key in self.held:
                continue
            storage = leaf.untyped_storage()
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return result

    @staticmethod
    def _key(leaf: Any) -> int | None:
        return leaf.untyped_storage()._cdata if isinstance(leaf, torch.Tensor) else None

    def _free(self, key: int) -> None:
        self.now -= self.held.pop(key)


@contextmanager
def without_trace(network: nn.Module) -> Iterator[None]:
    """Run passes in training mode, then restore buffers, mode and generators, and drop gradients.

    Gradients are allocated beforehand, as in every pass but the first, so that the memory of a pass
    grows only with its images.
    """
    training = network.training
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    device = next(network.parameters()).device
    # Only this rank's GPU: by default the generators of all GPUs are saved.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            network.train()
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            yield
        finally:
            network.train(training)
            for parameter in network.parameters():
                parameter.grad = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            torch.cuda.empty_cache()
