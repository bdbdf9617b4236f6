"""Compile transformer blocks with torch.compile: one graph per kind of block.

Blocks of a kind share their graphs, because their weights are inputs of the graph: a masked
autoencoder costs a few small compilations instead of whole networks, and the hooks of sharding and
gradient checkpointing stay outside the graphs. With drop path each block has graphs of its own,
because its rate is a constant of the graph.

On a GPU each bandwidth has its own graphs: Triton's kernels are tuned for one shape. On a CPU all
bandwidths share them: g++ takes a second per kernel, which is as fast for any number of tokens.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import nn

from mae_et.curriculum.plan import Plan
from mae_et.errors import one_line
from mae_et.models.decoders import CrossBlock
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext, any_rank
from mae_et.runtime.watchdog import heartbeat

STEPS_WORTH_COMPILING = 1000
"""Steps per bandwidth from which `auto` compiles: fewer do not repay the compilation."""


def should_compile(
    requested: bool | Literal["auto"], plan: Plan, world: DistributedContext
) -> bool:
    """Return whether to compile; `auto` compiles runs on a GPU that are long enough, if it works.

    If torch.compile fails on any rank, for example without a C compiler, no rank compiles, and one
    line says so. Every rank must call this.
    """
    if requested != "auto":
        return requested
    is_long = plan.steps >= STEPS_WORTH_COMPILING * len(plan.bandwidths)
    if world.device.type != "cuda" or not is_long:
        return False
    fault = compiler_fault(world.device)
    if not any_rank(bool(fault), world):
        return True
    reason = fault or "on another rank"
    notify(f"blocks are not compiled (efficiency.compile auto): torch.compile fails: {reason}")
    return False


@cache
def compiler_fault(device: torch.device) -> str:
    """Return why torch.compile fails on a device; an empty string if it works."""
    try:
        torch.compile(lambda x: x * 2, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # from Triton, the C compiler, or the driver
        return one_line(error)[:200]
    return ""


def compile_network(
    network: nn.Module,
    bandwidths: int = 1,
    backend: str | Callable[..., Any] = "inductor",
) -> nn.Module:
    """Compile a network's transformer blocks in place, or the whole network if it has none.

    Call it after sharding and before DistributedDataParallel, and call the returned network. On a
    CPU, blocks are compiled for any batch and number of tokens; otherwise shapes are static, and
    each of `bandwidths` input sizes has graphs of its own. Names in state dicts do not change.
    """
    _watch_compilation()
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    _start_autograd_threads(device)
    blocks = transformer_blocks(network)
    # Beyond these numbers of graphs per function, torch raises, or silently runs a whole network
    # eagerly. All blocks of a process are one function; with drop path each has its own graphs.
    graphs = max(4, len(blocks)) * bandwidths
    torch._dynamo.config.recompile_limit += graphs
    torch._dynamo.config.accumulated_recompile_limit += graphs
    # torch splits graphs at DistributedDataParallel's buckets, to overlap the exchange of gradients
    # with the backward pass. Blocks need no splits: each exchanges its own gradients.
    torch._dynamo.config.optimize_ddp = not blocks
    dynamic = device.type == "cpu" and bool(blocks)
    options: dict[str, Any] = {"dynamic": dynamic, "backend": backend}
    if not blocks:
        return torch.compile(network, **options)  # type: ignore[return-value]
    for block in blocks:
        block.compile(fullgraph=True, **options)
    return network


def _start_autograd_threads(device: torch.device) -> None:
    """Start the threads of a GPU's backward pass, with as many CPU threads as this one has.

    This number is a guard of every graph, and gradient checkpointing runs graphs in these threads.
    A loader that pins memory sets it to 1 for all threads started later, so each graph would be
    compiled again there, where `recompile_limit` is torch's default.
    """
    if device.type != "cpu":
        torch.ones((), device=device, requires_grad=True).backward()


class _Stopwatch:
    """Seconds of compilation since the last report.

    A heartbeat around each graph keeps the watchdog quiet unless one graph never finishes.
    """

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def start(self, *_: object) -> None:
        self.started = time.monotonic()
        heartbeat()

    def stop(self, *_: object) -> None:
        self.seconds += time.monotonic() - self.started
        heartbeat()


_stopwatch = _Stopwatch()


def _watch_compilation() -> None:
    callbacks = torch._dynamo.callback.callback_handler
    if _stopwatch.start not in callbacks.start_callbacks:
        callbacks.register_start_callback(_stopwatch.start)
        callbacks.register_end_callback(_stopwatch.stop)


def report_compilation(bandwidth: int) -> None:
    """Print how long compilation has taken since the last report, if anything was compiled."""
    if _stopwatch.seconds:
        notify(f"compiled for bandwidth {bandwidth} in {_stopwatch.seconds:.1f} s")
        _stopwatch.seconds = 0.0


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a network, in order."""
    return [module for module in network.modules() if isinstance(module, Block | CrossBlock)]
