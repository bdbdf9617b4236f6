"""Copy micro-batches to a GPU on a stream of its own.

On the training's stream, a copy would wait for all kernels queued before it, and those after it for
the copy. On another it runs beside them, for Python queues kernels faster than the GPU runs them.
"""

from collections.abc import Iterator

import torch

from mae_et.data.batch import AnyBatch

ON_CPU = {"stage", "replaced"}
"""Fields of a batch that Python reads."""


def copied(batches: Iterator[AnyBatch], device: torch.device) -> Iterator[AnyBatch]:
    """Yield batches with their images, noise and labels on a device.

    The current stream waits for a copy before it runs what the caller queues next; its memory is
    not handed out again while kernels that were queued on that stream may read it
    (`record_stream`), even if the caller drops the batch at once.

    Args:
        batches: named tuples of tensors, in pinned memory for asynchronous copies.
        device: the run's; a CPU gets the batches as they are.
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
