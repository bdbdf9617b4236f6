"""Write a classifier's weights, classes and final results, and read its scores."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from finetune.training.backbone import describe_backbone
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.writers.tensor_files import write_safetensors
from mae_et.io.metrics_file import SCORES, Row, read_metrics
from mae_et.io.seals import seal
from mae_et.monitoring.logger import RunLogger
from mae_et.training.run import Run
from mae_et.training.session import write_results


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
