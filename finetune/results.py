"""What a classifier's run leaves in its folder: scores, the best weights, and the last; figures."""

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from finetune.datasets import LabelledSplits
from finetune.evaluation import score
from mae_et.checkpoints.checksums import sealed_safetensors
from mae_et.data.loader import worker_count
from mae_et.io.atomic import write_atomically
from mae_et.io.metrics_file import SCORES, Row, read_metrics
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.training.nonfinite import check_state
from mae_et.training.run import Run
from mae_et.training.session import write_results


def evaluate_and_save_best(run: Run, data: LabelledSplits, monitor: RunLogger | None) -> None:
    """Score the weights that decide (and the raw ones, if they are an average's); keep the best.

    Raises:
        Diverged: they are not finite.
        Unreadable: an image is; a score over fewer images would be another score.
    """
    check_state(run)
    ema: Any = run.state.ema
    scores = evaluate_network(run, data, run.state.model)
    if ema is not None:
        raw = {f"raw_{name}": scores[name] for name in ("top1", "top5", "loss")}
        scores = evaluate_network(run, data, ema.module) | raw
    if monitor is None:
        return
    folder = run.config.output.dir
    # The weights first: where the scores are not written down they are made up for, and so are
    # weights; where they are, nothing is done again.
    if scores["top1"] > best_score(folder):
        write_weights(run, folder / "best.safetensors")
    monitor.score(run.state.step, scores)


def evaluate_network(run: Run, data: LabelledSplits, network: nn.Module) -> dict[str, Any]:
    """Score a network on the validation split, over all processes."""
    assert data.val is not None
    config = run.config
    distributed.broadcast_buffers(network, run.world)
    workers = worker_count(config.efficiency.num_workers, run.world.size)
    size, batch = config.model.image_size, run.micro_batch(run.plan.stages[-1].bandwidth)
    return score(
        network, data.val, config.data, size, run.world, run.dtype, batch, workers
    ).summary()


def best_score(folder: Path) -> float:
    """Return the best top-1 so far, in percent; -1 where there is none."""
    return max((row["top1"] for row in read_scores(folder)), default=-1.0)


def read_scores(folder: Path) -> list[Row]:
    """Return the scores so far; rows that have lost theirs, to a damaged disk, are left out."""
    return [row for row in read_metrics(folder, SCORES) if "top1" in row]


def describe(run: Run, data: LabelledSplits) -> str:
    """Return what is trained, beside its config and plan, as JSON."""
    network: Any = run.state.model
    about: dict[str, Any] = {"classes": list(data.train.classes)}
    if isinstance(run.state.model, VisionTransformer):  # what leaves no trace in its weights
        heads = (part.num_heads for part in network.blocks.modules() if hasattr(part, "num_heads"))
        about["encoder"] = network.default_cfg["architecture"]
        about["encoder_num_heads"] = next(heads)
        about["grid"] = list(network.patch_embed.grid_size)
    return json.dumps(about, indent=1)


def finish(run: Run, monitor: RunLogger | None) -> None:
    """Leave the weights and the final figures."""
    if monitor is None:
        return
    folder = run.config.output.dir
    write_weights(run, folder / "model.safetensors")
    figures: dict[str, Any] = {}
    if scores := read_scores(folder):
        best = max(scores, key=lambda row: row["top1"])
        figures = {key: value for key, value in scores[-1].items() if key not in {"step", "time"}}
        figures |= {"best_top1": best["top1"], "best_step": best["step"]}
    figures |= {"train_images": run.plan.images}
    write_results(run, monitor, read_metrics(folder), figures)


def write_weights(run: Run, path: Path) -> None:
    """Write the weights that decide (the average where there is one), with timm's names."""
    ema: Any = run.state.ema
    network: Any = run.state.model if ema is None else ema.module
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    content = sealed_safetensors(tensors, {"format": "pt"})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
