"""Run a `mae-et` command with one thing changed, to measure on a GPU what it costs.

    python -m mae_et.benchmarks.variants mixed pretrain --config ...

`benchmarks/gpu.sh` runs all variants of the headline recipe.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from mae_et.cli.main import main
from mae_et.data.device import decode_ahead, encoded
from mae_et.training.efficiency import compile as compiling
from mae_et.training.efficiency.cuda_graphs import Capture

CPU_PERCENT = 25
"""Images that `mixed` leaves to the CPU. On an H200 with 16 cores and `fourier`, 128 of 512 take 52
ms there, while the GPU decodes 384 in 25 ms and trains for 29 (96 pixels) or 54 ms (160)."""


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Change one thing for the training in the block, and for the rest of the process.

    Args:
        name: `default` changes nothing, nor do `memory`, `short` and `replay`, runs with
            `data.cache ram`, with `efficiency.attention short` as well, and with `data.replay`,
            which need no nvJPEG, or less of it. `deterministic` compiles without timing kernels,
            whose choice can differ from one start to the next (PyTorch 2.10). `connections` uses 32
            GPU queues instead of CUDA's default of 8: streams in one queue wait for each other.
            `priority` trains at a priority other than that of nvJPEG's streams, so that they share
            no queue. `mixed` leaves a part of the images to the loader processes, whose cores only
            read files otherwise.
    """
    compiling.STEPS_WORTH_COMPILING = 0  # these runs are short, and stand for long ones
    scope: AbstractContextManager[object] = contextlib.nullcontext()
    if name == "deterministic":
        torch._inductor.config.deterministic = True
    if name == "connections":
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # read when CUDA is initialised
    if name == "priority":
        stream = torch.cuda.Stream(priority=-1)
        Capture.default_capture_stream = stream  # captured kernels keep its priority
        scope = torch.cuda.stream(stream)
        decode_ahead.PRIORITY = -2
    if name == "mixed":
        read = encoded.read_encoded
        encoded.read_encoded = lambda dataset, index: (
            None if index.sample % 100 < CPU_PERCENT else read(dataset, index)
        )
    with scope:
        yield


if __name__ == "__main__":
    with variant(sys.argv[1]):
        sys.exit(main(sys.argv[2:]))
