"""Run a `mae-et` command with one thing changed, to measure on a GPU what it costs.

    python -m mae_et.benchmarks.variants priority pretrain --config ...

nvJPEG launches a small kernel for each image and waits for it: on an H200, 512 kernels of 2
microseconds for 512 images, about as many as a training pass has. They run on dozens of nvJPEG's
own streams, at the priority of training. It is not known what delays them during training; each
variant excludes one cause (`connections` brings one back). `benchmarks/gpu.sh` runs all variants.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from mae_et.cli.main import main
from mae_et.data.device import decode_ahead, encoded
from mae_et.training import build
from mae_et.training.efficiency import compile as compiling
from mae_et.training.efficiency.cuda_graphs import Capture

FREE_PROCESSORS = 12
"""Multiprocessors that `partition` leaves to decoding, of 132 on an H100 or H200 (groups of 8)."""
DECODING_THREADS = 6
CPU_PERCENT = 25
"""Images that `mixed` leaves to the CPU. On an H200 with 16 cores and `fourier`, 128 of 512 take 52
ms there, while the GPU decodes 384 in 25 ms and trains for 29 (96 pixels) or 54 ms (160)."""


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Change one thing for the training in the block, and for the rest of the process.

    Args:
        name: `default` changes nothing, nor do `memory` and `replay`, runs with `data.cache ram`
            and `data.replay`, which need no nvJPEG, or less of it. `connections` uses CUDA's
            default of 8 GPU queues; streams in one queue wait for each other. `priority` trains at
            a priority other than that of nvJPEG's streams, so that they share no queue. `partition`
            leaves some multiprocessors free, so that decoding does not wait for the blocks of other
            kernels (PyTorch 2.10). `unreplayed` launches each kernel of a pass by itself. `threads`
            decodes with 6 threads, whose waits overlap. `mixed` leaves a part of the images to the
            loader processes, whose cores only read files otherwise. `shared` compiles blocks once
            for all bandwidths. `attention` uses the memory-efficient kernel.
    """
    # Read when CUDA is initialised; runs use 32.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if name == "connections" else "32"
    compiling.STEPS_WORTH_COMPILING = 0  # these runs are short, and stand for long ones
    scope: AbstractContextManager[object] = contextlib.nullcontext()
    if name == "priority":
        scope = _on(torch.cuda.Stream(priority=-1))
        decode_ahead.PRIORITY = -2
    if name == "partition":
        from torch.cuda.green_contexts import GreenContext

        processors = torch.cuda.get_device_properties(0).multi_processor_count - FREE_PROCESSORS
        context = GreenContext.create(num_sms=processors, device_id=0)  # ends with this name
        scope = _on(context.Stream())
    if name == "unreplayed":
        build.should_replay = lambda *_: False
    if name == "threads":
        decode_ahead.THREADS = decode_ahead.AHEAD = DECODING_THREADS
    if name == "mixed":
        read = encoded.read_encoded
        encoded.read_encoded = lambda dataset, index: (
            None if index.sample % 100 < CPU_PERCENT else read(dataset, index)
        )
    if name == "shared":
        compiling.SHARING.add("cuda")
    if name == "attention":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_flash_sdp(False)
    with scope:
        yield


def _on(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Return a context in which a stream is current, also for captured graphs."""
    Capture.default_capture_stream = stream  # captured kernels keep its priority and partition
    return torch.cuda.stream(stream)


if __name__ == "__main__":
    with variant(sys.argv[1]):
        sys.exit(main(sys.argv[2:]))
