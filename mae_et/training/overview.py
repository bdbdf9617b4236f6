"""What a run trains and on what device, as lines at its start."""

import torch
from torch import nn

from mae_et.monitoring.figures import short
from mae_et.training.opening import describe_sizes, fact_line
from mae_et.training.run import Run


def overview(run: Run, num_workers: int) -> list[str]:
    """Return what a run trains, on what device and from which step, as aligned lines.

    Args:
        run: the run, new or restored.
        num_workers: loader processes of each rank.
    """
    facts = {"model": _model(run), "device": _device(run, num_workers)}
    if run.state.step:
        facts["start"] = f"resumes after step {run.state.step:,} of {run.plan.steps:,}"
    return [fact_line(name, fact) for name, fact in facts.items()]


def _model(run: Run) -> str:
    settings, model = run.config.model, run.state.model
    name = getattr(settings, "encoder", None) or getattr(settings, "backbone", None)
    parts = [f"{name or type(model).__name__}"]
    decoder = getattr(model, "decoder", None)
    total = _parameters(model)
    if isinstance(decoder, nn.Module):
        rest = _parameters(decoder)
        parts.append(f"{short(total - rest)} parameters and {short(rest)} of the decoder")
    else:
        parts.append(f"{short(total)} parameters")
    if run.config.curriculum.cost == "flops":
        costs = {stage.bandwidth: stage.cost for stage in run.plan.stages}
        figures = " / ".join(f"{cost / 1e9:.3g}" for cost in costs.values())
        parts.append(f"{figures} GFLOPs an image and step at {describe_sizes(list(costs))}")
    return ", ".join(parts)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _device(run: Run, num_workers: int) -> str:
    world = run.world
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"CPU, {_count(torch.get_num_threads(), 'thread')}"
    if world.size > 1:
        name = f"{world.size} x {name}"
    precision = str(run.dtype or torch.float32).removeprefix("torch.")
    bandwidths = dict.fromkeys(stage.bandwidth for stage in run.plan.stages)
    sizes = [run.micro_batch(bandwidth) for bandwidth in bandwidths]
    batches = " / ".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))
    loaders = _count(num_workers, "loader process", "es")
    return (
        f"{name}, {precision}, {'compiled' if run.compiled else 'not compiled'}; "
        f"micro-batch {batches}; {loaders}{' a rank' * (world.size > 1)}"
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural * (number != 1)}"
