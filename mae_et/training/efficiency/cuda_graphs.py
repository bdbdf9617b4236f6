"""Replay the forward and backward pass of a micro-batch as a CUDA graph.

A pass has up to a thousand kernels, and at small bandwidths Python takes longer to launch them than
the GPU to run them. A graph launches all of them at once. It repeats the same work in the same
memory: each micro-batch is copied to the memory of the first one, and its gradients are written to
the memory of the first one's. Each bandwidth has its own graph, or two if a step has several
micro-batches: one writes the gradients, the other adds to them.

Ranks exchange gradients after the passes of a step (`flat_gradients.py`), not during the backward
pass as DistributedDataParallel does.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_et.config.efficiency import EfficiencyConfig
from mae_et.data.batch import AnyBatch
from mae_et.data.device_copy import ON_CPU
from mae_et.errors import RunFailed, listed, one_line, require
from mae_et.runtime.agreement import all_gather_json
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.system_errors import is_out_of_gpu_memory
from mae_et.runtime.watchdog import heartbeat

WARM_UPS = 3
"""Passes before a capture, to let libraries allocate workspaces and compile blocks."""
AHEAD = 2
"""Passes that may be queued: with one call per pass, Python would queue hundreds, and hold the
batch of each in GPU memory."""

Pass = Callable[[Any], Tensor]
"""Forward and backward pass of a micro-batch; returns the loss, detached."""


def should_replay(efficiency: EfficiencyConfig, device: torch.device, static: bool) -> bool:
    """Return whether to replay passes; refuse `efficiency.cuda_graphs` where it is not possible.

    Sharding and gradient checkpointing rule it out: sharding exchanges weights within a pass, and
    checkpointing saves states of random generators there. So do passes that are not `static`:
    mixing and drop path draw numbers on the host, which a graph would repeat.
    """
    requested, on_gpu = efficiency.cuda_graphs is True, device.type == "cuda"
    require(on_gpu or not requested, "efficiency.cuda_graphs needs a GPU")
    require(
        static or not requested,
        "efficiency.cuda_graphs is only for pre-training, whose passes all do the same work",
    )
    return efficiency.replays and on_gpu and static


class _Graph(NamedTuple):
    replay: Callable[[], None]
    loss: Tensor
    pool: Any
    """Memory pool, shared with other graphs: only one runs at a time."""


class GraphedPasses:
    """Replay passes as CUDA graphs; see the module's docstring.

    Args:
        parameters: parameters that passes compute gradients of.
        required: raise if a pass cannot be captured; otherwise print a line and run all passes
            eagerly, on all ranks.
        world: ranks that run the same passes; captures are collectives.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        required: bool = False,
        world: DistributedContext | None = None,
    ):
        self.parameters, self.required = list(parameters), required
        self.world = world or DistributedContext(0, 1, torch.device("cuda"))
        self.enabled = True
        self.key: object = None
        self.batch: Any = None
        self.graphs: dict[bool, _Graph] = {}
        self.gradients: list[Tensor | None] = []
        self.queued: deque[Any] = deque()

    def __call__(self, work: Pass, batch: AnyBatch, key: object, first: bool) -> Tensor:
        """Return the result of `work(batch)`, with the same gradients.

        Args:
            work: the pass. Its other effects on the host happen only at its capture.
            batch: a batch whose images, uint8 or float32, and further tensors are on the GPU.
            key: what the work depends on besides the batch. If it or a shape changes, earlier
                graphs and their memory are released.
            first: whether the pass is the first of a step: its gradients replace earlier ones.
        """
        if not self.enabled:
            return work(batch)
        inputs = {name: each for name, each in batch._asdict().items() if name not in ON_CPU}
        whole_key = key, [each.shape for each in inputs.values()]
        if whole_key != self.key:
            self._release()
            self.key = whole_key
            memory = {n: torch.empty_like(e, dtype=torch.float32) for n, e in inputs.items()}
            self.batch = batch._replace(**memory)
        for name, each in inputs.items():
            # Scaled as the crop scales images of 8 bits: a graph then serves float images too.
            scale = 255 if each.dtype == torch.uint8 else 1
            torch.div(each, scale, out=getattr(self.batch, name))
        if first not in self.graphs and not self._capture(work, first):
            return work(batch)
        graph = self.graphs[first]
        graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        loss = graph.loss.clone()  # the next replay overwrites it
        self._throttle()
        return loss

    def _release(self, kept: Sequence[Tensor | None] = ()) -> None:
        """Free the memory of all graphs, except that of gradients to keep."""
        self.graphs.clear()
        self.gradients, self.batch = [], None
        for parameter, gradient in zip_longest(self.parameters, kept):
            parameter.grad = gradient
        torch.cuda.empty_cache()

    def _capture(self, work: Pass, first: bool) -> bool:
        """Capture a pass; return whether this succeeded on all ranks."""
        heartbeat()
        if first:
            self._warm_up(work)
        reason = ""
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
        # Outside `except`, because the error holds the memory of the capture.
        if self._succeeded(reason):
            if first:
                self.gradients = [parameter.grad for parameter in self.parameters]
            heartbeat()
            return True
        self.enabled = False
        self._release(self.gradients)  # keep those of the step's earlier passes
        return False

    def _succeeded(self, reason: str) -> bool:
        """Return whether no rank has a reason to run eagerly, for which all ranks would wait."""
        reasons = all_gather_json(reason, self.world)
        failed = {rank: each for rank, each in enumerate(reasons) if each}
        if failed and self.world.is_main:
            on = f" (rank {listed([*failed])})" if self.world.size > 1 else ""
            reason = next(iter(failed.values()))
            say(f"passes are not replayed (efficiency.cuda_graphs auto): {reason}{on}")
        return not failed

    def _warm_up(self, work: Pass) -> None:
        """Run the pass without capturing it, on its own stream, as torch.cuda.graph does."""
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
        """Wait until at most `AHEAD` passes are queued, so that the GPU always has the next one."""
        end = torch.cuda.Event(blocking=True)
        end.record()
        self.queued.append(end)
        if len(self.queued) > AHEAD:
            self.queued.popleft().synchronize()


class Capture(torch.cuda.graph):
    """A capture that raises the error within it, and leaves nothing open.

    After an error, `torch.cuda.graph` raises that of ending the capture, and its stream stays
    current.
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
    """Clean up what PyTorch leaves open after a failed capture.

    Before 2.13, the allocator would assume that the capture continues: it would no longer free the
    pool, nor tensors that another stream has used (pytorch/pytorch#180395, #190348). The generator
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
    """Capture a pass without running it; existing gradients are accumulated into."""
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    # Other threads, which load and decode, may allocate memory during the capture.
    with Capture(graph, pool, capture_error_mode="thread_local"):
        loss = work(batch)
    return _Graph(graph.replay, loss, pool)
