"""Count the launches of a training step, eager and compiled, with torch's profiler.

    mae-et bench launches [--encoder NAME --bandwidths '[96,224]']

A GPU launches about one kernel for each; some operators, such as the fused optimizer's, take more.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch.autograd.profiler import profile

from mae_et.config.efficiency import Device, Precision
from mae_et.config.model import ModelConfig
from mae_et.errors import require_in
from mae_et.runtime.distributed import choose_device

from .training_step import training_step

NO_KERNELS = ("aten::detach", "aten::empty", "aten::_unsafe_view", "aten::promote_types")
COMPILED_KERNELS = ("cpp_fused", "triton_")  # in the names that Inductor gives to its kernels
KINDS = {
    "products, attention": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product"),
    "casts": ("aten::_to_copy",),
    "other operators": ("aten::",),
}


@dataclass(frozen=True)
class LaunchesConfig:
    """Count the kernels and operators that a training step launches, eager and compiled."""

    encoder: str = "vit_base_patch16_224"
    """Name of a timm VisionTransformer."""
    batch: int = 2
    """Images of a step."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions."""
    bandwidths: tuple[int, ...] = (96, 224)
    """Sides of the images in pixels."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "batch", "bandwidths")


def bench_launches(config: LaunchesConfig) -> dict[str, Any]:
    """Count the launches of training steps by name, and print them by kind."""
    model, device = ModelConfig(config.encoder), choose_device(config.device)
    torch._inductor.config.cpp.enable_kernel_profile = True  # names the kernels on a CPU
    print(
        f"| step | all | {' | '.join(KINDS)} | compiled kernels |\n|---{'|---' * (len(KINDS) + 2)}|"
    )
    found: dict[str, Any] = {}
    for precision, bandwidth, compiled in product(
        config.precisions, config.bandwidths, (False, True)
    ):
        step = training_step(
            model, config.batch, bandwidth, precision, device, compiled, replayed=False
        )
        counts = launches(step)
        kinds = Counter(map(_kind, counts.elements()))
        name = f"{precision}, {bandwidth}, {'compiled' if compiled else 'eager'}"
        columns = [kinds[kind] for kind in (*KINDS, "compiled kernels")]
        print(f"| {name} | {' | '.join(str(n) for n in (counts.total(), *columns))} |", flush=True)
        found[name] = dict(counts.most_common())
    return found


def _kind(name: str) -> str:
    starts = (kind for kind, beginnings in KINDS.items() if name.startswith(beginnings))
    return next(starts, "compiled kernels")


def launches(step: Callable[[], object]) -> Counter[str]:
    """Count the operators and compiled kernels of a step by name, which approximates GPU launches.

    Views, which launch nothing, and operators inside other operators are not counted.
    """
    step()  # the first step fills caches that later ones reuse
    with profile(use_kineto=False) as recorded:
        step()
    return Counter(
        name
        for event in recorded.function_events
        if event.cpu_parent is None
        for name in _launched(event)
    )


def _launched(event: Any) -> Iterator[str]:
    if _computes(event.name):
        yield event.name
    else:
        for child in event.cpu_children:
            yield from _launched(child)


@cache
def _computes(name: str) -> bool:
    """Return whether an event is a compiled kernel or an operator with its own kernel."""
    if any(mark in name for mark in COMPILED_KERNELS):
        return True
    if not name.startswith("aten::") or name.startswith(NO_KERNELS):
        return False
    operator = getattr(torch.ops.aten, name.removeprefix("aten::"))
    overloads = [getattr(operator, overload) for overload in operator.overloads()]
    return any(
        not each.is_view
        for each in overloads
        if each.name() in _dispatched() and "out" not in each._overloadname
    )


@cache
def _dispatched() -> set[str]:
    """Return the operators that have kernels; all others call these."""
    dispatcher = torch._C
    composed = dispatcher._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    return set(dispatcher._dispatch_get_all_op_names()) - set(composed)
