"""Pre-train a masked autoencoder under the frequency curriculum: the method, top to bottom.

config -> plan -> model -> loop -> encoder. Whatever changes while training is in the `TrainState`;
the rest is a function of the config and the step, so a run goes on from its newest checkpoint as if
it had never stopped.
"""

import json
import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_et import distributed
from mae_et.atomic import write_text_atomically
from mae_et.checkpoint import (
    TrainState,
    export_encoder,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from mae_et.config import PretrainConfig, duration_in_steps, plain, to_yaml
from mae_et.cost import training_flops
from mae_et.curriculum import Curriculum, Plan, PlannedStage
from mae_et.data import (
    Batch,
    EvalView,
    PlannedBatches,
    TrainView,
    micro_batch_size,
    normalise,
    train_loader,
    worker_count,
)
from mae_et.datasets import Source, open_source
from mae_et.distributed import World
from mae_et.errors import Interrupted, RunFailed, UserError
from mae_et.frequency import low_frequency_crop
from mae_et.model import MaskedAutoencoder
from mae_et.monitor import RUN_SECTIONS, Monitor, Row, read_metrics
from mae_et.optim import build_optimizer, lr_at, set_schedule, weight_decay_at
from mae_et.panels import picture, reconstruction_panels
from mae_et.precision import autocast, autocast_dtype
from mae_et.pretrained import config_of

# Processes ask each other every so many steps whether one was told to stop.
AGREE_EVERY = 10


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as a config says, going on from the run folder's newest checkpoint.

    Returns:
        The run folder, with `encoder.safetensors` (a timm model) and `results.json` in it.

    Raises:
        UserError: the config, the data or the run folder cannot be used.
        RunFailed: the loss became infinite or NaN.
        Interrupted: a signal asked to stop; the state is saved.
    """
    world = distributed.start(config.efficiency.device)
    try:
        return _pretrain(config, world)
    finally:
        distributed.stop(world)


def _pretrain(config: PretrainConfig, world: World) -> Path:
    folder = config.output.folder
    if (folder / "results.json").exists():
        _check_same_run(folder, config, newest_checkpoint(folder / "checkpoints"))
        return folder
    source = open_source(config.data, "train", config.model.channels)
    saved = newest_checkpoint(folder / "checkpoints")
    _check_same_run(folder, config, saved)
    plan = Plan.from_dict(saved["plan"]) if saved else make_plan(config, len(source))
    _check_data(folder, plan, len(source))

    if world.device.type == "cuda" and config.efficiency.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder.from_config(config.model).to(world.device)
    model.set_gradient_checkpointing(config.efficiency.gradient_checkpointing)
    dtype = autocast_dtype(config.efficiency.precision, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    state = TrainState(model, build_optimizer(model, config.optim), scaler)
    if saved:
        state.restore(saved)
    del saved
    micro = micro_batch_size(config.efficiency.micro_batch, plan, world.size)
    trainer = Trainer(config, plan, world, state, wrap(model, config, world), dtype, micro)
    view = TrainView(source, config.data, plan, model.patch, config.seed)
    batches = PlannedBatches(plan, config.seed, micro, world.rank, world.size, state.step)
    workers = worker_count(config.efficiency.workers, world.size)
    loader = train_loader(view, batches, workers, world.device.type == "cuda")
    monitor = None
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / "config.yaml", to_yaml(config))
        write_text_atomically(folder / "plan.json", json.dumps(plan.to_dict(), indent=1))
        monitor = Monitor(config, plan, state.step)
    try:
        with stop_signals() as stopped:
            _loop(trainer, iter(loader), monitor, source, stopped)
        if monitor is not None:
            _finish(trainer, monitor)
    finally:
        if monitor is not None:
            monitor.close()
    distributed.barrier(world)
    return folder


@dataclass
class Trainer:
    """What a step needs and no step changes, but for the state."""

    config: PretrainConfig
    plan: Plan
    world: World
    state: TrainState
    network: nn.Module
    """The state's model, as it is called: compiled, and wrapped for several processes."""
    dtype: torch.dtype | None
    """Autocast dtype; None for float32."""
    micro_batch: Callable[[int], int]
    """From a bandwidth to the images of one forward pass."""

    def accumulation(self, stage: PlannedStage) -> int:
        """Return the micro-batches of one step."""
        return self.plan.batch_size // self.world.size // self.micro_batch(stage.bandwidth)


def _loop(
    trainer: Trainer,
    batches: Iterator[Batch],
    monitor: Monitor | None,
    source: Source,
    stopped: "StopFlag",
) -> None:
    """Train from the state's step to the plan's last."""
    config, plan, world, state = trainer.config, trainer.plan, trainer.world, trainer.state
    log_every, save_every, draw_every = (
        duration_in_steps(d, plan.steps)
        for d in (
            config.output.log_every,
            config.output.checkpoint_every,
            config.output.reconstruct_every,
        )
    )
    window = Window()
    while state.step < plan.steps:
        stage = plan.at(state.step)
        set_schedule(state.optimizer, plan.progress(state.step), config.optim)
        micro_batches = window.timed(islice(batches, trainer.accumulation(stage)))
        window.add(*train_step(trainer, stage, micro_batches))
        state.step += 1

        last = state.step == plan.steps
        asked = world.size == 1 or state.step % AGREE_EVERY == 0
        stopping = asked and distributed.agree(stopped.signal is not None, world) and not last
        saving = state.step % save_every == 0 or last or stopping
        stage_ends = state.step == stage.start + stage.steps
        if state.step % log_every == 0 or stage_ends or saving:
            row = window.close(trainer, stage)
            if monitor is not None:
                monitor.log(row)
        drawing = config.output.reconstruct_images > 0 and (state.step % draw_every == 0 or last)
        if monitor is not None and drawing:
            with window.paused():
                monitor.picture(state.step, draw_reconstructions(trainer, source, stage))
        if monitor is not None and saving:
            with window.paused():
                monitor.flush()
                save(trainer)
        if stopping:
            distributed.barrier(world)
            number = stopped.signal or signal.SIGTERM
            raise Interrupted(state.step, number, str(config.output.folder))


def train_step(
    trainer: Trainer, stage: PlannedStage, batches: Iterator[Batch]
) -> tuple[Tensor, Tensor]:
    """Update the weights once; return the loss and the gradient's norm, on the device."""
    config, state, device = trainer.config, trainer.state, trainer.world.device
    accumulation = trainer.accumulation(stage)
    losses = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        images = normalise(
            batch.images.to(device, non_blocking=True), config.data.mean, config.data.std
        )
        images = low_frequency_crop(images, stage.bandwidth, config.crop.method)
        noise = batch.noise.to(device, non_blocking=True)
        # Processes exchange gradients once a step, with the last micro-batch.
        with _no_sync(trainer.network, number < accumulation):
            with autocast(trainer.dtype, device):
                loss = trainer.network(images, config.model.mask_ratio, noise).loss / accumulation
            state.scaler.scale(loss).backward()
        losses += loss.detach()
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.optim.clip_grad is not None:
        clip_grads_with_norm_(parameters, config.optim.clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return losses, norm


class Window:
    """Steps between two rows of metrics: sums stay on the device until the row is read."""

    def __init__(self) -> None:
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self.steps = 0
        self.loss: Tensor | None = None
        self.norm: Tensor | None = None
        self.waited = 0.0
        self.started = now

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, and count the time that they were waited for."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.norm = norm
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the time."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def close(self, trainer: Trainer, stage: PlannedStage) -> Row:
        """Return the row of the steps since the last one; the only wait for the device.

        Raises:
            RunFailed: the loss of one of them is not finite.
        """
        plan, state, world = trainer.plan, trainer.state, trainer.world
        assert self.loss is not None
        assert self.norm is not None
        numbers = torch.stack([self.loss / self.steps, self.norm.to(self.loss)])
        loss, norm = distributed.mean(numbers, world).tolist()
        now = time.perf_counter()
        seconds = now - self.started
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss became {loss} between steps {state.step - self.steps + 1} and "
                f"{state.step}; the last good checkpoint is kept in {trainer.config.output.folder}"
            )
        state.seconds += seconds
        progress = plan.progress(state.step - 1)
        row: Row = {
            "step": state.step,
            "stage": stage.index,
            "bandwidth": stage.bandwidth,
            "magnitude": stage.magnitude,
            "epoch": state.step * plan.batch_size / plan.dataset_size,
            "equivalent_epochs": plan.progress(state.step) * plan.equivalent_epochs,
            "compute": plan.progress(state.step),
            "loss": loss,
            "grad_norm": norm,
            "lr": lr_at(progress, trainer.config.optim),
            "weight_decay": weight_decay_at(progress, trainer.config.optim),
            "images_per_second": self.steps * plan.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_gib": peak_memory(world.device) / 2**30,
            "seconds": state.seconds,
            "window_steps": self.steps,
            "window_seconds": seconds,
        }
        self._restart(now)
        return row


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were held: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_plan(config: PretrainConfig, dataset_size: int) -> Plan:
    """Resolve a config's curriculum for a data set.

    Raises:
        UserError: the curriculum, the batch and the data do not fit each other.
    """
    curriculum = Curriculum.from_config(
        config.curriculum, config.model.image_size, config.model.patch
    )
    cost = None
    if config.curriculum.cost == "flops":
        with torch.device("meta"):
            model = MaskedAutoencoder.from_config(config.model)
        cost = training_flops(model, config.model.channels, config.model.mask_ratio)
    return curriculum.plan(config.curriculum.epochs, dataset_size, config.optim.batch_size, cost)


def wrap(model: MaskedAutoencoder, config: PretrainConfig, world: World) -> nn.Module:
    """Compile and distribute a model, as far as the config and the world ask for it."""
    network: nn.Module = model
    if config.efficiency.compile:
        # One graph for each bandwidth, none of them with symbolic shapes.
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=devices)
    return network


def draw_reconstructions(trainer: Trainer, source: Source, stage: PlannedStage) -> Tensor:
    """Return a picture of the first images' reconstructions, at the stage's bandwidth."""
    config, device = trainer.config, trainer.world.device
    model = trainer.state.model
    assert isinstance(model, MaskedAutoencoder)
    view = EvalView(source, config.data, config.model.image_size)
    count = min(config.output.reconstruct_images, len(view))
    images = torch.stack([view[i][0] for i in range(count)]).to(device)
    images = normalise(images, config.data.mean, config.data.std)
    images = low_frequency_crop(images, stage.bandwidth, config.crop.method)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.rand(count, (stage.bandwidth // model.patch) ** 2, generator=generator)
    panels = reconstruction_panels(
        model, images, noise.to(device), config.model.mask_ratio, config.data
    )
    return picture(panels)


def save(trainer: Trainer) -> None:
    """Write a checkpoint, then delete those that are no longer wanted."""
    config, plan = trainer.config, trainer.plan
    folder = config.output.folder / "checkpoints"
    save_checkpoint(folder, trainer.state, to_yaml(config), plan.to_dict())
    every = config.output.keep_every
    keep_every = None if every is None else duration_in_steps(every, plan.steps)
    prune_checkpoints(folder, config.output.keep_last, keep_every)


def _finish(trainer: Trainer, monitor: Monitor) -> None:
    """Leave the encoder and the final figures; the last, for it says that the run is done."""
    folder, config, plan = trainer.config.output.folder, trainer.config, trainer.plan
    model = trainer.state.model
    assert isinstance(model, MaskedAutoencoder)
    description = {"format": "timm", "encoder": json.dumps(plain(config.model))}
    export_encoder(model.encoder, folder / "encoder.safetensors", description)
    rows = read_metrics(folder)
    results = {
        "loss": rows[-1]["loss"],
        "loss_at_first": rows[0]["loss"],
        "steps": plan.steps,
        "images": plan.images,
        "equivalent_epochs": plan.equivalent_epochs,
        "training_seconds": trainer.state.seconds,
        "speed_by_stage": speed_by_stage(rows, plan),
    }
    monitor.finish(results)
    monitor.flush()
    write_text_atomically(folder / "results.json", json.dumps(results, indent=1))


def speed_by_stage(rows: list[Row], plan: Plan) -> list[dict[str, float]]:
    """Return bandwidth, images per second and compute of each stage of a run's metrics."""
    speeds = []
    for stage in plan.stages:
        mine = [row for row in rows if row["stage"] == stage.index]
        images = sum(row["window_steps"] for row in mine) * plan.batch_size
        seconds = sum(row["window_seconds"] for row in mine)
        speeds.append(
            {
                "bandwidth": stage.bandwidth,
                "images": images,
                "images_per_second": round(images / seconds, 1),
                "flops": stage.cost * images,
            }
        )
    return speeds


class StopFlag:
    """The signal that asked the run to stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn SIGTERM, SIGINT and SIGUSR2 into a flag that the loop reads between steps.

    A second SIGINT stops at once.
    """
    flag = StopFlag()

    def raise_flag(number: int, frame: object) -> None:
        if flag.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield flag  # only the main thread may install handlers
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    kept = {number: signal.signal(number, raise_flag) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _no_sync(network: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    if wanted and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


def _check_same_run(folder: Path, config: PretrainConfig, saved: dict[str, Any] | None) -> None:
    """Refuse a run folder that holds a run of other numbers.

    Raises:
        UserError: a key that decides the numbers differs; the sentence names the first.
    """
    if saved is None:
        return
    before, now = plain(config_of(saved)), plain(config)
    for section in (*RUN_SECTIONS, "seed"):
        pairs = {section: (before[section], now[section])}
        if isinstance(now[section], dict):
            pairs = {f"{section}.{k}": (before[section][k], v) for k, v in now[section].items()}
        for key, (old, new) in pairs.items():
            # Where the data lie may change; what they are is checked by their number.
            if old != new and key not in {"data.root", "data.download"}:
                raise UserError(
                    f"{folder} holds a checkpoint of another run: {key} was {old!r} and is now "
                    f"{new!r}; give another output.folder"
                )


def _check_data(folder: Path, plan: Plan, images: int) -> None:
    if plan.dataset_size != images:
        raise UserError(
            f"{folder} holds a checkpoint of another run: the data had {plan.dataset_size} images "
            f"and now have {images}; give another output.folder"
        )
