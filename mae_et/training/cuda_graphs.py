"""Replay the forward and backward pass of a micro-batch as a CUDA graph.

A pass has up to a thousand kernels, and at small bandwidths Python takes longer to launch them than
the GPU to run them. A graph launches all of them at once. It repeats the same work in the same
memory: a micro-batch is copied to where the first one was, and its gradients are written to where
those of the first one are. Each bandwidth has a graph of its own, or two where a step has several
micro-batches: one writes the gradients, the other adds to them.

Several ranks exchange gradients after the passes of a step (`average_gradients`), in one piece, and
not during the backward pass as DistributedDataParallel does.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mae_et.config.efficiency import EfficiencyConfig
from mae_et.data.batch import AnyBatch
from mae_et.data.device_copy import ON_CPU
from mae_et.errors import RunFailed, one_line, require
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.system_errors import is_out_of_gpu_memory
from mae_et.runtime.watchdog import heartbeat
from mae_et.training.memory import release_cached_memory

WARM_UPS = 3
"""Passes before a capture, in which libraries allocate workspaces and blocks are compiled."""
AHEAD = 2
"""Passes that may be queued: with one call each, Python would queue hundreds, and hold the batch of
each in the GPU's memory."""

Pass = Callable[[Any], Tensor]
"""Forward and backward pass of a micro-batch; returns the loss, detached."""


def should_replay(efficiency: EfficiencyConfig, device: torch.device, static: bool) -> bool:
    """Return whether to replay passes (`efficiency.cuda_graphs`).

    Sharding and gradient checkpointing exclude it: one exchanges weights within a pass, the other
    saves states of random generators there.

    Args:
        efficiency: the run's.
        device: the run's.
        static: whether every pass does the same work. Mixing and drop path draw numbers on the
            host, which a graph would repeat.

    Raises:
        UserError: graphs are requested where they are not possible.
    """
    requested, on_gpu = efficiency.cuda_graphs is True, device.type == "cuda"
    require(on_gpu or not requested, "efficiency.cuda_graphs needs a GPU")
    require(
        static or not requested,
        "efficiency.cuda_graphs is only for pre-training with its own step, whose passes all do "
        "the same work",
    )
    return efficiency.replays and on_gpu and static


class _Graph(NamedTuple):
    replay: Callable[[], None]
    loss: Tensor
    pool: Any
    """Memory that another graph may use in turn: only one runs at a time."""


class GraphedPasses:
    """Run passes by replaying them; see the module's docstring.

    Args:
        parameters: what passes compute gradients of.
        required: raise if a pass cannot be captured; otherwise run all passes eagerly then, and
            print a line.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], required: bool = False):
        self.parameters, self.required = list(parameters), required
        self.enabled = True
        self.key: object = None
        self.batch: Any = None
        self.graphs: dict[bool, _Graph] = {}
        self.gradients: list[Tensor | None] = []
        self.queued: deque[Any] = deque()

    def __call__(self, work: Pass, batch: AnyBatch, key: object, first: bool) -> Tensor:
        """Return what `work(batch)` returns, and leave the same gradients.

        Args:
            work: the pass. Whatever it does besides, on the host, is done at its capture only.
            batch: its images and further tensors on the GPU.
            key: what the work depends on besides the batch. When it changes, or a shape does,
                earlier graphs and their memory are released.
            first: whether the pass is the first of a step, whose gradients replace those before it.

        Raises:
            RunFailed: the pass cannot be captured, and `required` is set.
        """
        if not self.enabled:
            return work(batch)
        inputs = {name: each for name, each in batch._asdict().items() if name not in ON_CPU}
        whole_key = key, [(each.shape, each.dtype) for each in inputs.values()]
        if whole_key != self.key:
            self._release()
            self.key = whole_key
            self.batch = batch._replace(**{name: each.clone() for name, each in inputs.items()})
        if first not in self.graphs and not self._capture(work, first):
            return work(batch)
        for name, each in inputs.items():
            getattr(self.batch, name).copy_(each)
        graph = self.graphs[first]
        graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        loss = graph.loss.clone()  # the next replay overwrites it
        self._throttle()
        return loss

    def _release(self, kept: Sequence[Tensor | None] = ()) -> None:
        """Return the memory of all graphs to the GPU, except that of gradients to keep."""
        self.graphs.clear()
        self.gradients, self.batch = [], None
        for parameter, gradient in zip_longest(self.parameters, kept):
            parameter.grad = gradient
        release_cached_memory(self.parameters[0].device)

    def _capture(self, work: Pass, first: bool) -> bool:
        """Capture a pass; return whether that is possible."""
        heartbeat()
        if first:
            self._warm_up(work)
        try:
            pool = self.graphs[True].pool if self.graphs else None
            self.graphs[first] = record(work, self.batch, pool)
        except RuntimeError as error:
            reason = one_line(error)[:200]
            if self.required:
                if is_out_of_gpu_memory(error):
                    raise
                raise RunFailed(
                    f"efficiency.cuda_graphs true: the pass cannot be captured: {reason}"
                ) from error
        else:
            if first:
                self.gradients = [parameter.grad for parameter in self.parameters]
            heartbeat()
            return True
        # Not within `except`: the error holds the memory of the capture. An eager pass needs less.
        notify(f"passes are not replayed (efficiency.cuda_graphs auto): {reason}")
        self.enabled = False
        self._release(self.gradients)  # but for those of the step's earlier passes
        return False

    def _warm_up(self, work: Pass) -> None:
        """Run the pass outside of a capture, on a stream of its own as torch.cuda.graph's."""
        device = self.parameters[0].device
        training = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                work(self.batch)
                for parameter in self.parameters:
                    parameter.grad = None
        training.wait_stream(stream)

    def _throttle(self) -> None:
        """Wait until at most `AHEAD` passes are queued; the GPU always has the next one."""
        end = torch.cuda.Event(blocking=True)
        end.record()
        self.queued.append(end)
        if len(self.queued) > AHEAD:
            self.queued.popleft().synchronize()


class Capture(torch.cuda.graph):
    """A capture that raises the error within it, and leaves nothing open.

    After an error torch's own raises that of the end of the capture, and its stream stays current.
    """

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except RuntimeError:
            self.stream_ctx.__exit__(*error)
            _end_failed_capture(*self.pool)
            if error[0] is None:
                raise


def _end_failed_capture(pool: Any) -> None:
    """End what PyTorch leaves open after a capture that failed.

    Before 2.13, the allocator would take the capture to go on: it would free no tensor any more
    that another stream has used, nor the pool (pytorch/pytorch#180395, #190348). The generator
    would refuse to draw numbers.
    """
    library: Any = torch._C
    device = torch.cuda.current_device()
    end = getattr(library, "_cuda_endAllocateToPool", None)  # its name after 2.7
    with contextlib.suppress(RuntimeError):  # nothing is open
        (end or library._cuda_endAllocateCurrentStreamToPool)(device, pool)
        library._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


def record(work: Pass, batch: AnyBatch, pool: Any) -> _Graph:
    """Capture a pass, without running it; gradients that exist are added to."""
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    # Other threads, which load and decode, may allocate memory meanwhile.
    with Capture(graph, pool, capture_error_mode="thread_local"):
        loss = work(batch)
    return _Graph(graph.replay, loss, pool)


def average_gradients(gradients: Sequence[Tensor], world: DistributedContext) -> None:
    """Average gradients over all ranks in place, all of them in one exchange.

    They are divided before they are added, as DistributedDataParallel does.
    """
    if world.size == 1:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients]).div_(world.size)
    dist.all_reduce(joined)
    parts = joined.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        list(gradients), [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    )
