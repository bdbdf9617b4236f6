"""Copy micro-batches to a GPU on a separate stream.

On the training stream, a copy would wait for all kernels queued before it, and later kernels for
the copy. On another stream it runs beside them, because Python queues kernels faster than the GPU
runs them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mae_et.data.batch import AnyBatch

ON_CPU = {"stage", "replaced"}
"""Fields of a batch that stay on the host."""


def copied(batches: Iterator[AnyBatch], device: torch.device) -> Iterator[AnyBatch]:
    """Yield batches with their images, noise and labels on a device; unchanged on a CPU.

    The current stream waits for a copy before it runs what the caller queues next. Memory is not
    reused while kernels queued on that stream may read it (`record_stream`), even if the caller
    drops the batch at once. Copies from pinned memory are asynchronous.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        fields = {name: each for name, each in batch._asdict().items() if name not in ON_CPU}
        with torch.cuda.stream(copies):
            moved = {name: each.to(device, non_blocking=True) for name, each in fields.items()}
        training = torch.cuda.current_stream(device)
        training.wait_stream(copies)
        for tensor in moved.values():
            tensor.record_stream(training)
        yield batch._replace(**moved)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, through pinned memory, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # unless it is
    return tensor.to(device, non_blocking=True)
