"""The block of lines at the start of a run that says what it is.

A run of one rank prints it before PyTorch is loaded, which takes seconds, so that mistakes in data
and plan are reported at once. What PyTorch alone knows (other ranks, the size and the plan of a
network that timm builds) follows, and what turns out different is corrected.
"""

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, TypeVar

from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.config.data import DataConfig
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.probe import OnlineProbeConfig
from mae_et.config.schema import OutputConfig, PretrainConfig
from mae_et.curriculum.mae_cost import mae_parameters
from mae_et.curriculum.plan import Plan
from mae_et.data.datasets import ImageDataset, count_unlabelled, open_dataset
from mae_et.data.layout import ROOTED
from mae_et.monitoring.figures import short
from mae_et.runtime.console import is_main, notify, write_line
from mae_et.runtime.hardware import default_workers, expected_gpu, expected_threads, usable_cores
from mae_et.training.plan import curriculum_of, make_plan, micro_batch_size, worth_compiling
from mae_et.version import __version__

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Data = TypeVar("Data")


class Opening(Generic[Data]):
    """The start of a run: its training data, and what the main rank has printed of the run.

    Args:
        command: the command's name.
        config: the run's config.
        read: opens the training data, and prints what is known of the run by then.
    """

    def __init__(self, command: str, config: Any, read: Callable[["Opening[Data]"], Data]):
        self.config, self.read = config, read
        self.facts: dict[str, str] = {}
        self.alone = os.environ.get("WORLD_SIZE", "1") == "1"
        folder = config.output.dir
        self.step = max(map(checkpoint_step, list_checkpoints(folder / "checkpoints")), default=0)
        self.finished = (folder / "results.json").exists()
        state = f"resumes; newest checkpoint: step {self.step:,}" if self.step else "new"
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
        """What `read` returns.

        Raises:
            UserError: the curriculum or the data cannot be used.
        """
        return self.read(self)

    def open_early(self) -> "Opening[Data]":
        """Open the data before PyTorch is loaded; with other ranks, after all have joined."""
        if self.alone and not self.finished:
            _ = self.data
        return self

    def say(self, **facts: str) -> None:
        """Print facts that are new, and of those printed before, what turns out different."""
        for name, fact in facts.items():
            known = self.facts.get(name, "").split("; ")
            different = [part for part in fact.split("; ") if part not in known]
            if is_main() and different:
                corrected = f"{'; '.join(different)} (corrected)"
                write_line(f"{name:<8}{corrected if name in self.facts else fact}")
            self.facts[name] = fact

    def say_expected(self, plan: Plan | None = None) -> None:
        """Print device and precision of the only rank, and model and plan of a pre-training."""
        if not self.alone:
            return
        config, gpu = self.config, _expected_gpu(self.config.efficiency)
        if plan is not None and (counts := mae_parameters(config.model)):
            self.say(model=_model(config, config.model.encoder, *counts, plan))
        self.say(device=_expected_device(config.efficiency, gpu))
        if plan is not None:
            self.say(plan=_expected_plan(config.efficiency, gpu, plan))
        self.say(curves=curves_command(config.output))

    def say_built(self, run: Any) -> None:
        """Print what a built `Run` is, except what is printed already; every rank calls this."""
        import torch

        from mae_et.data.cores import worker_count

        config, model, plan, world = run.config, run.state.model, run.plan, run.world
        workers = worker_count(config.efficiency.num_workers, world)
        device = _cpu(torch.get_num_threads())
        if world.device.type == "cuda":
            device = torch.cuda.get_device_name(world.device)
        if run.state.step != self.step:
            self.say(start=f"after step {run.state.step:,}")
        named = getattr(config.model, "encoder", None) or getattr(config.model, "backbone", None)
        decoder = getattr(model, "decoder", None)
        inner = 0 if decoder is None else _parameters(decoder)
        # timm would name the architecture whose sizes a checkpoint overrides.
        name = named or f"ViT of width {model.embed_dim} and depth {len(model.blocks)}"
        dtype = str(run.dtype or "float32").removeprefix("torch.")
        self.say(
            model=_model(config, name, _parameters(model) - inner, inner, plan),
            device=_device(device, world.size, dtype, workers),
            plan=_plan(
                plan,
                None if run.state.micro_batch else run.micro_batch,
                run.compiled,
                run.graphs is not None,
            ),
            curves=curves_command(config.output),
        )


def open_training_images(opening: Opening[ImageDataset]) -> ImageDataset:
    """Open the training images of a pre-training, and print what is known of it.

    Raises:
        UserError: the curriculum or the data cannot be used.
    """
    config: PretrainConfig = opening.config
    curriculum_of(config)  # refused before a large folder is listed
    source = open_dataset(config.data, "train", config.model.channels)
    opening.say(data=describe_data(config.data, source))
    extends = config.init.extends is not None  # then the plan is the other run's, which may be gone
    opening.say_expected(None if extends else make_plan(config, len(source)))
    if config.probe.every is None and config.probe != OnlineProbeConfig():
        notify("keys of probe are given, and probe.every is not: the encoder is not probed")
    return source


def describe_data(config: DataConfig, source: ImageDataset) -> str:
    """Return what a run trains on: where it is, images, classes."""
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


def _expected_gpu(efficiency: EfficiencyConfig) -> str | None:
    if efficiency.device == "cuda":
        return expected_gpu() or "GPU"  # or an error, once PyTorch is loaded
    return expected_gpu() if efficiency.device == "auto" else None


def _expected_device(efficiency: EfficiencyConfig, gpu: str | None) -> str:
    workers = efficiency.num_workers
    if workers is None:
        workers = default_workers(len(usable_cores()), on_cpu=gpu is None)
    dtype = DTYPES.get(efficiency.precision, "float32" if gpu is None else "bfloat16")
    return _device(gpu or _cpu(expected_threads(workers)), 1, dtype, workers)


def _expected_plan(efficiency: EfficiencyConfig, gpu: str | None, plan: Plan) -> str:
    requested, compiled = efficiency.micro_batch, efficiency.compile
    if compiled == "auto":
        compiled = gpu is not None and worth_compiling(plan)
    fitted = requested == "auto" or (requested is None and gpu is not None)
    sizes = None if fitted else micro_batch_size(requested, plan, 1)
    return _plan(plan, sizes, compiled, gpu is not None and efficiency.replays)


def _model(config: Any, name: str, parameters: int, decoder: int, plan: Plan) -> str:
    fact = f"{name}, {short(parameters)} parameters"
    if decoder:
        fact += f" and {short(decoder)} of the decoder"
    if config.curriculum.cost == "flops":
        costs = {stage.bandwidth: f"{stage.cost / 1e9:.3g}" for stage in plan.stages}
        fact += f", {' / '.join(costs.values())} GFLOPs an image and step at {_sizes(plan)}"
    return fact


def _device(name: str, ranks: int, dtype: str, num_workers: int) -> str:
    loaders = f"{num_workers:,} loader process{'es' * (num_workers != 1)}"
    if ranks > 1:
        name, loaders = f"{ranks} x {name}", f"{loaders} a rank"
    return f"{name}, {dtype}; {loaders}"


def _cpu(threads: int) -> str:
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def _plan(
    plan: Plan, micro_batch: Callable[[int], int] | None, compiled: bool, graphs: bool
) -> str:
    """Describe a plan and its steps; `micro_batch` is None where it is yet to be fitted."""
    stages = len(plan.stages)
    fact = (
        f"{plan.steps:,} steps of {plan.batch_size:,} images, {stages} stage{'s' * (stages > 1)} "
        f"at {_sizes(plan)}; {plan.images / plan.dataset_size:.4g} epochs of images for the "
        f"compute of {plan.equivalent_epochs:.4g}; "
    )
    if micro_batch is not None:
        sizes = [micro_batch(bandwidth) for bandwidth in _bandwidths(plan)]
        fact += f"micro-batch {' / '.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))}, "
    return fact + ("compiled" if compiled else "not compiled") + ", CUDA graphs" * graphs


def _bandwidths(plan: Plan) -> list[int]:
    """Return the bandwidths of a plan, each once, in the order of its stages."""
    return list(dict.fromkeys(stage.bandwidth for stage in plan.stages))


def _sizes(plan: Plan) -> str:
    return " / ".join(map(str, _bandwidths(plan))) + " px"


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
