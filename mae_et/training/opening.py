"""Describe a run in a block of lines at its start.

A run on one rank opens its data before PyTorch is loaded, which takes seconds, so that mistakes in
data and plan are reported at once.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mae_et.checkpoints.listing import list_checkpoints
from mae_et.config.data import DataConfig
from mae_et.config.probe import OnlineProbeConfig
from mae_et.config.schema import OutputConfig, PretrainConfig, RunConfig
from mae_et.data.datasets import ROOTED, ImageDataset, count_unlabelled, open_dataset
from mae_et.data.layout import check_outside, split_folder
from mae_et.errors import UserError
from mae_et.io.metrics_file import METRICS
from mae_et.io.score_records import RESULTS
from mae_et.monitoring.figures import short
from mae_et.runtime.console import is_main, notify, write_line
from mae_et.training.plan import curriculum_of, make_plan
from mae_et.training.resume.outputs import missing_outputs
from mae_et.version import __version__

Data = TypeVar("Data")


def open_early(command: str, config: Any, read: Callable[[Any], Data]) -> Data | None:
    """Name a run, and open its data before PyTorch is loaded.

    None, for `train_run` to open it, if other ranks have to join first or the run is finished.
    """
    say_command(command, config)
    folder = config.output.dir
    rewrites = missing_outputs(config) and list_checkpoints(folder / "checkpoints")
    finished = (folder / RESULTS).exists() and not rewrites
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return read(config) if alone and not finished else None


def say_command(command: str, config: Any) -> None:
    """Name a run's command and folder on the main rank."""
    check_outside(config.data, config.output.dir)
    if is_main():
        write_line(f"mae-et {__version__}: {command} in {config.output.dir}")


def describe_start(config: RunConfig, step: int) -> str:
    """Describe where a run starts, which has not written to its folder yet."""
    folder = config.output.dir
    if not step:
        rows = folder / METRICS  # without a checkpoint where old files were purged
        again = rows.is_file() and rows.stat().st_size > 0
        return "starts again, for there is no checkpoint" if again else "new"
    if (folder / RESULTS).exists() and (missing := missing_outputs(config)):
        return f"finished before, without {missing[0]}: writes it from step {step:,}"
    resumes = list_checkpoints(folder / "checkpoints")  # not those of a run that it continues
    return f"{'resumes' if resumes else 'new,'} after step {step:,}"


def say_facts(**facts: str) -> None:
    """Print facts about a run, one per line, on the main rank."""
    for name, fact in facts.items():
        if is_main():
            write_line(f"{name:<8}{fact}")


def open_training_images(
    config: PretrainConfig, source: ImageDataset | None = None
) -> ImageDataset:
    """Open the training images of a pre-training run, unless given, and describe them."""
    curriculum_of(config)  # refused before a large folder is listed
    source = source or open_dataset(config.data, "train", config.model.channels)
    say_facts(data=describe_data(config.data, source))
    if config.continues is None:
        make_plan(config, len(source))  # refused before PyTorch is loaded
    if source.classes and config.data.source == "folder" and config.data.root is not None:
        _report_missing_val(config.data)
    if config.probe.every is None and config.probe != OnlineProbeConfig():
        notify("keys of probe have no effect without probe.every")
    return source


def _report_missing_val(data: DataConfig) -> None:
    """Print a line if scores of the run will lack validation images."""
    try:
        split_folder(data, "val")
    except UserError:
        notify(
            f"data.root {data.root} has no {data.val_split} split, which scores need: add one, or "
            f"hold out a fifth with --data.root {split_folder(data, 'train')}"
        )


def describe_data(config: DataConfig, source: ImageDataset) -> str:
    """Describe a run's training data: location, images, classes."""
    kind = config.source
    where = config.root if kind in ROOTED else kind
    unlabelled, classes = count_unlabelled(source), len(source.classes)
    labels = f", {classes:,} classes" if classes else ", no labels"
    if unlabelled and classes:
        labels += f", {unlabelled:,} without a label"
    return f"{where}, training split: {len(source):,} images{labels}"


def curves_command(output: OutputConfig) -> str:
    """Return the command that shows the curves of a run."""
    return f"{'tensorboard --logdir' if output.tensorboard else 'mae-et report'} {output.dir}"


def describe_run(run: Any) -> dict[str, str]:
    """Describe a built `Run`: model, plan, cost, device; every rank must call this."""
    from mae_et.data.cores import worker_count

    config, plan = run.config, run.plan
    stages, bandwidths = len(plan.stages), {stage.bandwidth: stage for stage in plan.stages}
    workers = worker_count(config.efficiency.num_workers, run.world)
    cost = f"{plan.images / plan.dataset_size:.4g} epochs for the compute of "
    cost += f"{plan.equivalent_epochs:.4g}"
    if config.curriculum.cost == "flops":
        flops = _joined(f"{stage.cost / 1e9:.3g}" for stage in bandwidths.values())
        cost = f"{flops} GFLOPs an image; {cost}"
    passes = "compiled" if run.compiled else "not compiled"
    passes += ", CUDA graphs" * bool(run.graphs) + ", short attention" * run.short_attention
    if not run.state.micro_batch:  # otherwise a line gave those that fit
        sizes = dict.fromkeys(run.micro_batch[bandwidth] for bandwidth in bandwidths)
        passes = f"micro-batch {_joined(sizes)}, {passes}"
    return {
        "model": _describe_model(config.model, run.state.model),
        "plan": f"{plan.steps:,} steps of {plan.batch_size:,} images, {stages} "
        f"stage{'s' * (stages > 1)} at {_joined(bandwidths)} px",
        "cost": cost,
        "device": f"{_describe_device(run)}; {workers:,} loader process{'es' * (workers != 1)}"
        + " a rank" * (run.world.size > 1),
        "passes": passes,
        "curves": curves_command(config.output),
    }


def _describe_model(config: Any, model: Any) -> str:
    name = getattr(config, "encoder", None) or getattr(config, "backbone", None)
    if name is None:  # timm would name the architecture whose sizes a checkpoint overrides
        name = f"ViT of width {model.embed_dim} and depth {len(model.blocks)}"
    decoder = getattr(model, "decoder", None)
    inner = 0 if decoder is None else _parameters(decoder)
    outer = f"{name}, {short(_parameters(model) - inner)} parameters"
    return f"{outer} and {short(inner)} of the decoder" if inner else outer


def _describe_device(run: Any) -> str:
    import torch

    device, ranks = run.world.device, run.world.size
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' * (threads != 1)}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    dtype = str(run.dtype or "float32").removeprefix("torch.")
    return f"{f'{ranks} x ' * (ranks > 1)}{name}, {dtype}"


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _joined(parts: Iterable[object]) -> str:
    return " / ".join(map(str, parts))
