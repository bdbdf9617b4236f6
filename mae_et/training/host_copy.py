"""Copy a training state to host memory that is allocated once."""

import copy
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

from mae_et.runtime.console import say
from mae_et.runtime.host_memory import available_host_memory


class HostCopy:
    """Host memory for copies of a state; each copy replaces the previous one.

    Memory is pinned for tensors of a GPU, which makes their copies several times as fast. PyTorch's
    allocator rounds each pinned block up to a power of two.
    """

    def __init__(self) -> None:
        self._held: list[UntypedStorage] = []
        self._reported = False

    def take(
        self, state: dict[str, Any], live: Collection[int] | None = None
    ) -> dict[str, Any] | None:
        """Return a copy of a state that `torch.save` writes as it would write the state.

        Storages are copied whole and once, so that tensors which share memory still do.

        Args:
            state: nested containers of tensors and plain types.
            live: addresses of the storages to copy; None for all. Other tensors are kept.

        Returns:
            The copy; None, reported in a line once, if it would take more than half of the host
            memory that is left, or cannot be allocated.
        """
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        found = {_place(tensor): tensor.untyped_storage() for tensor in tensors}
        copied = [place for place in found if live is None or place[0] in live]
        if not self._hold([found[place] for place in copied]):
            return None
        for place, held in zip(copied, self._held, strict=True):
            held.copy_(found[place], non_blocking=True)
            found[place] = held
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        views = {id(tensor): _view(tensor, found[_place(tensor)]) for tensor in tensors}
        return copy.deepcopy(state, views)

    def _hold(self, storages: list[UntypedStorage]) -> bool:
        """Allocate memory for storages, unless it is there; return whether it is."""
        if [held.nbytes() for held in self._held] == [each.nbytes() for each in storages]:
            return True
        self._held = []
        sizes = [(each.nbytes(), each.device.type == "cuda") for each in storages]
        needed = sum(1 << (size - 1).bit_length() if pinned else size for size, pinned in sizes)
        left = available_host_memory()
        if left is None or needed <= left // 2:
            with suppress(RuntimeError):  # a limit of the process, or on pinned memory
                self._held = [
                    torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
                    for size, pinned in sizes
                ]
                return True
            why = "which the system refuses"
        else:
            why = f"more than half of the {left / 1e9:,.1f} GB that are left"
        if not self._reported:
            say(
                "training waits while checkpoints are written: a copy of its state takes "
                f"{needed / 1e9:,.1f} GB of host memory, {why}"
            )
        self._reported = True
        return False


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return address and length of a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _view(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """Return a tensor of the same type, shape and strides in another storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
