"""A kind of training: what differs between pre-training and classifiers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.datasets import ImageDataset
from mae_et.data.train_dataset import AugmentedDataset
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.periodic import Periodic
from mae_et.training.run import Run


class Task(ABC):
    """What a kind of training adds to `train_run`, which calls the methods in this order.

    Every rank calls them. `saved` is the checkpoint that the run resumes from, None for a new run.
    """

    config: RunConfig
    replayable = False
    """Whether the losses of a stage do the same work for each micro-batch, so that CUDA graphs can
    replay them."""
    fits_by_default = False
    """Whether micro-batches on a GPU are fitted to its memory unless the config gives a size."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, if the run keeps one."""

    @abstractmethod
    def open_images(self) -> ImageDataset:
        """Return the training images, opened once; an error on one rank ends all."""

    @abstractmethod
    def build_model(
        self, saved: dict[str, Any] | None, world: DistributedContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model, on the CPU, and what checkpoints record of its initial weights."""

    @abstractmethod
    def make_plan(self, model: nn.Module, images: int) -> Plan:
        """Resolve the config's curriculum for a number of training images."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model, which may be sharded."""

    def divisor_of_micro_batches(self, model: nn.Module) -> int:
        """Return the number by which fitted micro-batches are divisible."""
        return 1

    @abstractmethod
    def dry_pass(self, run: Run, stage: PlannedStage, count: int) -> None:
        """Run forward and backward on black images, to measure the memory of a micro-batch.

        The run's network is neither compiled nor wrapped yet.
        """

    def check_micro_batches(self, model: nn.Module, sizes: Sequence[int]) -> None:  # noqa: B027
        """Refuse micro-batches that the loss cannot be computed on."""

    @abstractmethod
    def augment(self, model: nn.Module, images: ImageDataset, plan: Plan) -> AugmentedDataset[Any]:
        """Return the dataset that micro-batches are loaded from."""

    def files(self, run: Run) -> dict[str, str]:
        """Return further texts for the run folder, by file name."""
        return {}

    def periodic(self, run: Run) -> list[Periodic]:
        """Return the work between steps."""
        return []

    def preview(self, run: Run, dataset: Any) -> Tensor | None:
        """Draw training views, uint8 [3 H W], for a run folder without such an image."""
        return None

    @abstractmethod
    def loss(self, run: Run, stage: PlannedStage, batch: Any, number: int) -> Tensor:
        """Return the mean loss [] of a micro-batch, float32 on the device.

        `batch` is on the CPU or the device, and the `number`-th of its step, from 0.
        """

    @abstractmethod
    def finish(self, run: Run, logger: RunLogger | None) -> None:
        """Write the final files; only the main rank has a logger."""
