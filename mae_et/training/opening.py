"""Describe a run in a block of lines at its start.

A run on one rank opens its data before PyTorch is loaded, which takes seconds, so that mistakes in
data and plan are reported at once.
"""

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Generic, TypeVar

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.config.data import DataConfig
from mae_et.config.probe import OnlineProbeConfig
from mae_et.config.schema import OutputConfig, PretrainConfig
from mae_et.data.datasets import ImageDataset, count_unlabelled, open_dataset
from mae_et.data.layout import ROOTED, check_outside
from mae_et.io.metrics_file import METRICS
from mae_et.monitoring.figures import short
from mae_et.runtime.console import is_main, notify, write_line
from mae_et.training.plan import curriculum_of, make_plan
from mae_et.version import __version__

Data = TypeVar("Data")


class Opening(Generic[Data]):
    """The start of a run: its training data, and the lines that the main rank prints.

    `read` opens and describes the training data.
    """

    def __init__(self, command: str, config: Any, read: Callable[["Opening[Data]"], Data]):
        self.config, self.read = config, read
        self.alone = os.environ.get("WORLD_SIZE", "1") == "1"
        folder = config.output.dir
        check_outside(config.data, folder)
        self.step = max(map(checkpoint_step, list_checkpoints(folder / "checkpoints")), default=0)
        self.finished = (folder / "results.json").exists()
        rows = folder / METRICS  # without a checkpoint where old files were purged
        trained = rows.is_file() and rows.stat().st_size > 0
        state = "starts again, for there is no checkpoint" if trained else "new"
        if self.step:
            state = f"resumes; newest checkpoint: step {self.step:,}"
        if self.finished:
            state = "finished before"
            missing = [name for name in config.outputs if not (folder / name).exists()]
            if missing and self.step:
                self.finished = False
                state = f"finished before, without {missing[0]}: writes it from step {self.step:,}"
        if is_main():
            write_line(f"mae-et {__version__}: {command} in {folder}: {state}")

    @cached_property
    def data(self) -> Data:
        """The training data, opened by `read` when first used."""
        return self.read(self)

    def open_early(self) -> "Opening[Data]":
        """Open the data before PyTorch is loaded, unless other ranks have to join first."""
        if self.alone and not self.finished:
            _ = self.data
        return self

    def say(self, **facts: str) -> None:
        """Print facts about the run, one per line, on the main rank."""
        for name, fact in facts.items():
            if is_main():
                write_line(f"{name:<8}{fact}")

    def say_built(self, run: Any) -> None:
        """Describe a built `Run`; every rank must call this."""
        if run.state.step != self.step:
            self.say(start=f"after step {run.state.step:,}")
        self.say(**describe_run(run))


def open_training_images(
    opening: Opening[ImageDataset], source: ImageDataset | None = None
) -> ImageDataset:
    """Open the training images of a pre-training run, unless given, and describe them."""
    config: PretrainConfig = opening.config
    curriculum_of(config)  # refused before a large folder is listed
    source = source or open_dataset(config.data, "train", config.model.channels)
    opening.say(data=describe_data(config.data, source))
    if config.continues is None:
        make_plan(config, len(source))  # refused before PyTorch is loaded
    if config.probe.every is None and config.probe != OnlineProbeConfig():
        notify("keys of probe have no effect without probe.every")
    return source


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
    passes = ("compiled" if run.compiled else "not compiled") + ", CUDA graphs" * bool(run.graphs)
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
