"""Train a classifier: full fine-tuning, a linear probe, or from scratch under a curriculum.

    config -> network -> plan -> crop(S), normalise, erase -> batch -> device -> mix -> logits
           -> loss -> step -> scores

A frozen encoder makes it a probe; a timm backbone with stages of growing bandwidth makes it
supervised EfficientTrain++. Session and loop are those of pre-training.

Sources: MAE's fine-tuning (arXiv 2111.06377, appendix A), EfficientTrain++ (arXiv 2405.08768).
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import ClassifierConfig
from finetune.datasets import Splits, open_splits
from finetune.training.model import build_classifier, load_run_network
from finetune.training.param_groups import build_optimizer
from finetune.training.plan import make_plan, shown_sides
from finetune.training.preprocessing import preprocessing_of_start
from finetune.training.results import PeriodicEvaluation, describe, finish
from finetune.training.transforms import LabelledBatch, LabelledTrainDataset, mix
from mae_et.checkpoints.layouts.timm_hub import require_checkpoint
from mae_et.checkpoints.listing import run_of
from mae_et.checkpoints.preprocessing import report_preprocessing
from mae_et.config.typed import typed
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.datasets import ImageDataset
from mae_et.data.sampler import sample_seed
from mae_et.errors import UserError
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.training.opening import say_command
from mae_et.training.periodic import Periodic
from mae_et.training.run import Run
from mae_et.training.session import train_run
from mae_et.training.task import Task


def classify(config: ClassifierConfig) -> dict[str, Any]:
    """Train the classifier of a config, resuming from the run folder's newest checkpoint.

    Returns:
        The final figures, which are also in the run folder's `results.json`.

    Raises:
        UserError: the config, the data, the checkpoint or the run folder cannot be used.
        RunFailed: the loss or a gradient became infinite or NaN, images cannot be read, memory ran
            out, or a loader process died.
        Interrupted: a signal requested a stop; the state is saved.
    """
    config = typed(config, ClassifierConfig)
    say_command("classify", config)
    train_run(Classification(config))
    return json.loads((config.output.dir / "results.json").read_text(encoding="utf-8"))


class Classification(Task):
    """Train a classifier; `train_run` calls the methods in this order.

    `splits` are the training and validation images, if they are open already.
    """

    def __init__(self, config: ClassifierConfig, splits: Splits | None = None):
        self.config: ClassifierConfig = config
        self.splits = splits
        self.ema_decay = config.optim.ema

    def open_splits(self) -> Splits:
        """Open the splits, unless they are open."""
        if self.splits is None:
            self.splits = open_splits(self.config)
        return self.splits

    def open_images(self) -> ImageDataset:
        """Open the training split."""
        return self.open_splits()[0]

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""
        return self.open_images().classes

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, in pairs."""
        return bool(self.config.recipe.mixup or self.config.recipe.cutmix)

    def build_model(
        self, saved: dict[str, Any] | None, world: DistributedContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Build the network, new or of the checkpoint."""
        ranks = saved["origin"].get("processes", world.size) if saved else world.size
        if world.is_main and ranks != world.size:
            warnings.warn(
                "this run resumes on another number of ranks: the samples stay the same, but each "
                "rank draws its own mixing and drop path and has its own batch-norm statistics",
                stacklevel=1,
            )
        with fail_together(world):
            network: Any = build_network(self.config, saved, len(self.classes))
        if self.config.efficiency.gradient_checkpointing:
            try:
                network.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                raise UserError(
                    "efficiency.gradient_checkpointing: this network does not support it"
                ) from error
        return network, {}

    def make_plan(self, model: nn.Module, images: int) -> Plan:
        """Resolve the curriculum, whose image sizes and costs depend on the network."""
        return make_plan(self.config, model, images)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the config's optimizer."""
        return build_optimizer(model, self.config.optim)

    def divisor_of_micro_batches(self, model: nn.Module) -> int:
        """Return 2 for pairs to mix, and for batch norm, which needs two images."""
        return 2 if self.mixes or has_batch_norm(model) else 1

    def dry_pass(self, run: Run, stage: PlannedStage, count: int) -> None:
        """Run forward and backward on black images, which are not mixed."""
        config, device = self.config.model, run.world.device
        sides = shown_sides(config.image_size, run.network)(stage.bandwidth)
        images = torch.zeros(count, config.channels, *sides, device=device)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        self._cross_entropy(run, images, labels).backward()

    def check_micro_batches(self, model: nn.Module, sizes: Sequence[int]) -> None:
        """Refuse odd sizes to mix, and single images to normalise."""
        if self.mixes and any(size % 2 for size in sizes):
            raise UserError("recipe.mixup and recipe.cutmix need micro-batches of even size")
        if has_batch_norm(model) and min(sizes) == 1:
            raise UserError("batch norm needs micro-batches of at least two images")

    def augment(self, model: nn.Module, images: ImageDataset, plan: Plan) -> LabelledTrainDataset:
        """Return augmented images with their labels."""
        config = self.config
        shown = shown_sides(config.model.image_size, model)
        return LabelledTrainDataset(
            images, config.data, config.recipe, plan, config.seed, config.model.image_size,
            config.crop.method, [shown(stage.bandwidth) for stage in plan.stages],
        )  # fmt: skip

    def files(self, run: Run) -> dict[str, str]:
        """Describe the classes and the network."""
        return {"classes.json": describe(run, self.classes)}

    def periodic(self, run: Run) -> list[Periodic]:
        """Score the validation split."""
        _, val = self.open_splits()
        every = self.config.output.evaluate_every
        return [] if val is None or every is None else [PeriodicEvaluation(run, every, val)]

    def loss(self, run: Run, stage: PlannedStage, batch: LabelledBatch, number: int) -> Tensor:
        """Return the cross-entropy of a micro-batch.

        Drop path and mixing draw from (seed, step, rank, micro-batch), so a resumed run draws the
        same numbers as an uninterrupted one.
        """
        key = (self.config.seed, run.state.step, run.world.rank)
        if number == 0:
            torch.manual_seed(sample_seed(*key))
        images = batch.images.to(run.world.device, non_blocking=True)
        labels = batch.labels.to(run.world.device, non_blocking=True)
        seed = sample_seed(*key, number)
        images, targets = mix(images, labels, self.config.recipe, len(self.classes), seed)
        return self._cross_entropy(run, images, targets)

    def _cross_entropy(self, run: Run, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(run.dtype, run.world.device):
            logits = run.network(images)
        return F.cross_entropy(logits.float(), targets)

    def finish(self, run: Run, logger: RunLogger | None) -> None:
        """Write the last weights and results.json."""
        finish(run, logger)


def has_batch_norm(network: nn.Module) -> bool:
    """Return whether a network normalises over the images of a micro-batch."""
    return any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in network.modules())


def plan_classifier(config: ClassifierConfig, images: int, classes: int = 1000) -> Plan:
    """Return the plan of a new run; the number of classes hardly changes its cost."""
    return make_plan(config, build_network(config, None, classes), images)


def build_network(
    config: ClassifierConfig, saved: dict[str, Any] | None, classes: int
) -> nn.Module:
    """Build a new network, or a checkpoint's, whose initial weights may be gone."""
    if saved is None:
        start = config.model.checkpoint
        if start is not None:
            require_checkpoint(start)
        if start is not None or config.model.pretrained:
            recorded = preprocessing_of_start(config.model)
            report_preprocessing(recorded, config.data, start or config.model.backbone)
        return build_classifier(config.model, classes)
    return load_run_network(config.model, run_of(Path(saved["path"])), saved["model"])
