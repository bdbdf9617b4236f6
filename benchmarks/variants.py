"""A `mae-et` command with one thing changed, to measure on a GPU what it costs.

    python -m benchmarks.variants own pretrain --config ...

nvJPEG launches a small kernel for each image, and waits for it: on an H200, 512 of 2 microseconds
for 512 images, as many as a pass of training has kernels. They run on dozens of streams of its own,
at the priority of training. What delays them beside training is not known; each variant excludes a
cause (or, `connections`, brings it back). `benchmarks/gpu.sh` runs all.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from mae_et.cli.main import main
from mae_et.data import device_decode
from mae_et.training.compile import SHARING
from mae_et.training.cuda_graphs import Capture

FREE_PROCESSORS = 12
"""What `partition` leaves to decoding, of 132 on an H100 or H200; groups have 8."""


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Run training inside with one thing changed, for the rest of the process.

    Args:
        name: `default` changes nothing. `connections` gives the streams CUDA's 8 queues of the GPU;
            those in one queue wait for each other. `priority` trains at another priority than
            nvJPEG's streams have, with which it then shares no queue. `own` trains on another
            stream than CUDA's default one, for whose work libraries' may wait. `partition` leaves
            some multiprocessors free: elsewhere a kernel waits for the blocks of another to end.
            `shared` compiles blocks once for all bandwidths.
    """
    # Read when CUDA is initialised; 32 as of a run.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if name == "connections" else "32"
    scope: AbstractContextManager[object] = contextlib.nullcontext()
    if name == "priority":
        scope = _on(torch.cuda.Stream(priority=-1))
        device_decode.PRIORITY = -2
    if name == "own":
        scope = _on(torch.cuda.Stream())
    if name == "partition":
        from torch.cuda.green_contexts import GreenContext

        processors = torch.cuda.get_device_properties(0).multi_processor_count - FREE_PROCESSORS
        context = GreenContext.create(num_sms=processors, device_id=0)  # ends with this name
        scope = _on(context.Stream())
    if name == "shared":
        SHARING.add("cuda")
    with scope:
        yield


def _on(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Return a context in which a stream is the current one, also of graphs that are captured."""
    Capture.default_capture_stream = stream  # their kernels keep its priority and partition
    return torch.cuda.stream(stream)


if __name__ == "__main__":
    with variant(sys.argv[1]):
        sys.exit(main(sys.argv[2:]))
