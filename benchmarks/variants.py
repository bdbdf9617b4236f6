"""A `mae-et` command with one thing changed, to measure on a GPU what it costs.

    python -m benchmarks.variants own pretrain --config ...

nvJPEG launches a small kernel for each image, and waits for it (512 of 2 microseconds for 512
images on an H200, as many as a pass of training has kernels). What delays them beside training is
not known; each stream excludes a cause. `benchmarks/gpu.sh` runs all variants.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from mae_et.cli.main import main
from mae_et.training.compile import SHARING
from mae_et.training.cuda_graphs import Capture

FREE_PROCESSORS = 12
"""What `partition` leaves to decoding, of 132 on an H100 or H200; groups have 8."""


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Run training inside with one thing changed.

    Args:
        name: `default` changes nothing. `own` runs training on a stream of its own: what libraries
            launch on CUDA's default stream waits for what is queued there. `partition` leaves some
            multiprocessors free: elsewhere a kernel waits for the blocks of another to end,
            whatever its priority. `connections` gives the streams more queues of the GPU; those in
            one queue wait for each other. `shared` compiles blocks once for all bandwidths.
    """
    scope: AbstractContextManager[object] = contextlib.nullcontext()
    if name == "connections":
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # read when CUDA is initialised
    if name == "own":
        scope = torch.cuda.stream(torch.cuda.Stream())
    if name == "partition":
        from torch.cuda.green_contexts import GreenContext

        processors = torch.cuda.get_device_properties(0).multi_processor_count - FREE_PROCESSORS
        context = GreenContext.create(num_sms=processors, device_id=0)  # ends with this name
        Capture.default_capture_stream = stream = context.Stream()  # a graph runs where captured
        scope = torch.cuda.stream(stream)
    if name == "shared":
        SHARING.add("cuda")
    with scope:
        yield


if __name__ == "__main__":
    with variant(sys.argv[1]):
        sys.exit(main(sys.argv[2:]))
