"""Write a classifier's scores, its best and last weights, and its final results."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from finetune.datasets import LabelledSplits
from finetune.scores import score
from mae_et.checkpoints.checksums import sealed_safetensors
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.data.cores import worker_count
from mae_et.io.atomic import write_atomically
from mae_et.io.metrics_file import SCORES, Row, read_metrics
from mae_et.io.seals import seal
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.training.nonfinite import check_state
from mae_et.training.run import Run
from mae_et.training.session import write_results


def evaluate_and_save_best(run: Run, data: LabelledSplits, logger: RunLogger | None) -> None:
    """Score the network (with optim.ema its average, and the raw weights too), and keep the best.

    Raises:
        Diverged: the weights are not finite.
        Unreadable: an image cannot be read; a score of fewer images would not be comparable.
    """
    check_state(run)
    ema: Any = run.state.ema
    scores = evaluate_network(run, data, run.state.model)
    if ema is not None:
        raw = {f"raw_{name}": scores[name] for name in ("top1", "top5", "loss")}
        scores = evaluate_network(run, data, ema.module) | raw
    if logger is None:
        return
    folder = run.config.output.dir
    # Weights before scores: a resumed run redoes both if the scores are missing, and neither if
    # they are there.
    if scores["top1"] > best_score(folder):
        write_weights(run, folder / "best.safetensors")
    logger.log_scores(run.state.step, scores)


def evaluate_network(run: Run, data: LabelledSplits, network: nn.Module) -> dict[str, Any]:
    """Score a network on the validation split, over all ranks."""
    assert data.val is not None
    config = run.config
    distributed.broadcast_buffers(network, run.world)
    workers = worker_count(config.efficiency.num_workers, run.world)
    size, batch = config.model.image_size, run.micro_batch(run.plan.stages[-1].bandwidth)
    return score(
        network, data.val, config.data, size, run.world, run.dtype, batch, workers
    ).summary()


def best_score(folder: Path) -> float:
    """Return the best top-1 so far, in percent; -1 before the first evaluation."""
    return max((row["top1"] for row in read_scores(folder)), default=-1.0)


def read_scores(folder: Path) -> list[Row]:
    """Return the scores so far, without rows that a damaged disk has cut."""
    return [row for row in read_metrics(folder, SCORES) if "top1" in row]


def describe(run: Run, data: LabelledSplits) -> str:
    """Return what the config does not say of the network, as JSON: classes, heads, grid."""
    network: Any = run.state.model
    preprocessing = Preprocessing.of_run(run.config.data, run.config.model.image_size)
    about: dict[str, Any] = {
        "classes": list(data.train.classes), "preprocessing": asdict(preprocessing)
    }  # fmt: skip
    if isinstance(run.state.model, VisionTransformer):  # not visible in the weights' shapes
        heads = (part.num_heads for part in network.blocks.modules() if hasattr(part, "num_heads"))
        about["encoder"] = network.default_cfg["architecture"]
        about["encoder_num_heads"] = next(heads)
        about["grid"] = list(network.patch_embed.grid_size)
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
    results |= {"train_images": run.plan.images}
    write_results(run, logger, results)


def write_weights(run: Run, path: Path) -> None:
    """Write the weights (with optim.ema their average) under timm's names."""
    ema: Any = run.state.ema
    network: Any = run.state.model if ema is None else ema.module
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    content = sealed_safetensors(tensors, {"format": "pt"})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
