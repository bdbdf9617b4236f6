"""Score a classifier during its run, and write its weights, classes and results."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from finetune.scores import score
from finetune.training.backbone import describe_backbone
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.writers.tensor_files import write_safetensors
from mae_et.config.duration import Duration
from mae_et.data.cores import worker_count
from mae_et.data.datasets import ImageDataset
from mae_et.io.metrics_file import SCORES, Row, read_metrics
from mae_et.io.seals import seal
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.training.nonfinite import check_state
from mae_et.training.periodic import Periodic
from mae_et.training.run import Run
from mae_et.training.session import write_results


class PeriodicEvaluation(Periodic):
    """Score a split every `output.evaluate_every` (a share: at least an epoch) and at the end."""

    def __init__(self, run: Run, every: Duration, val: ImageDataset):
        super().__init__(run, every)
        if str(every).endswith("%"):  # a short run would score as often as it trains
            epoch = -(-run.plan.dataset_size // run.plan.batch_size)
            self.every = max(self.every, epoch)
        self.val = val

    def do(self, logger: RunLogger | None) -> None:
        """Score the network (with optim.ema, its average and the raw weights), and keep the best.

        Raises:
            Diverged: the weights are not finite.
            Unreadable: an image cannot be read; a score on fewer images would not be comparable.
        """
        run = self.run
        ema = run.state.ema
        check_state(run)
        scores = self._score(run.state.model)
        if ema is not None:
            own = {"top1", "top5", "val_loss"}
            raw = {f"raw_{name}": value for name, value in scores.items() if name in own}
            scores = self._score(ema.module) | raw
        if logger is None:
            return
        folder = run.config.output.dir
        # Weights before scores: a resumed run redoes both if the scores are missing, and neither if
        # they are there.
        if scores["top1"] > max((row["top1"] for row in read_scores(folder)), default=-1.0):
            write_weights(run, folder / "best.safetensors")
        logger.log_scores(run.state.step, scores)

    def _score(self, network: nn.Module) -> dict[str, Any]:
        """Score a network on the validation split, over all ranks."""
        run, config = self.run, self.run.config
        distributed.broadcast_buffers(network, run.world)
        workers = worker_count(config.efficiency.num_workers, run.world)
        size, batch = config.model.image_size, run.micro_batch[run.plan.stages[-1].bandwidth]
        return score(
            network, self.val, config.data, size, run.world, run.dtype, batch, workers
        ).summary()


def read_scores(folder: Path) -> list[Row]:
    """Return the scores so far, without rows that a damaged disk truncated."""
    return [row for row in read_metrics(folder, SCORES) if "top1" in row]


def describe(run: Run, classes: Sequence[str]) -> str:
    """Return the run's classes, preprocessing, heads and grid as JSON."""
    network: Any = run.state.model
    preprocessing = Preprocessing.of_run(run.config.data, run.config.model.image_size)
    about: dict[str, Any] = {"classes": list(classes), "preprocessing": asdict(preprocessing)}
    backbone = run.config.model.backbone
    if backbone is not None and (described := describe_backbone(backbone, network)):
        about["backbone"] = described
    if isinstance(run.state.model, VisionTransformer):  # not visible in the weights' shapes
        heads = (part.num_heads for part in network.blocks.modules() if hasattr(part, "num_heads"))
        about["encoder"] = network.default_cfg["architecture"]
        about["encoder_num_heads"] = next(heads)
        about["grid"] = list(network.patch_embed.grid_size)
        norms = (part.eps for part in network.blocks.modules() if hasattr(part, "eps"))
        about["norm_eps"] = next(norms, None)
    return json.dumps(seal(about), indent=1)


def finish(run: Run, logger: RunLogger | None) -> None:
    """Write the last weights and the final results."""
    if logger is None:
        return
    folder = run.config.output.dir
    write_weights(run, folder / "model.safetensors")
    results: dict[str, Any] = {}
    if scores := read_scores(folder):
        best = max(scores, key=lambda row: row["top1"])
        results = {key: value for key, value in scores[-1].items() if key not in {"step", "time"}}
        results |= {"best_top1": best["top1"], "best_step": best["step"]}
    results |= {"images": run.plan.images}
    write_results(run, logger, results)


def write_weights(run: Run, path: Path) -> None:
    """Write the weights (with optim.ema their average) under timm's names."""
    network = run.state.model if run.state.ema is None else run.state.ema.module
    write_safetensors(network.state_dict(), path)
