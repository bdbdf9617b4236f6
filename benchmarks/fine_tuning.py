"""Compare the downstream accuracy of a pre-trained encoder with that of the untrained encoder.

    python benchmarks/fine_tuning.py --run RUN --root FOLDER --epochs 20 --probe-epochs 90

Each encoder is fully fine-tuned and linearly probed with the same recipe and budget (further flags
apply to both); the fast probe on cached features is listed beside the full one. Finished arms are
skipped. Prints a Markdown table.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import ClassifierConfig, ProbeConfig, classify, score_encoder
from mae_et import load_config
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.models.mae import MaskedAutoencoder

COMMON = [
    "--data.eval_crop=1.0", "--data.scale=[0.2, 1.0]", "--optim.warmup_fraction=0.1",
    "--output.evaluate_every=25%", "--output.checkpoint_every=10%",
]  # fmt: skip
# LARS's updates are relative to the weights, so a probe needs a minimum number of steps: MAE's 90
# epochs of ImageNet at batch 16384 are 7,000. A small batch gives as many on little data.
PROBE_BATCH = 32
# The peak learning rate of MAE's recipe, 6.4, at this batch.
PROBE_LR = 6.4 * 256 / PROBE_BATCH
ENCODERS = ("pre-trained", "untrained")
ARMS = {
    "fine-tuned": [
        # The peak learning rate of MAE's recipe for ViT-B, 2e-3, at this batch.
        "--model.pool=mean", "--optim.batch_size=128", "--optim.base_lr=4.0e-3",
        "--optim.layer_decay=0.75",
    ],
    "full probe": [
        "--model.pool=cls", "--model.probe=linear", "--optim.optimizer=lars",
        f"--optim.batch_size={PROBE_BATCH}",
        f"--optim.base_lr={PROBE_LR}", "--optim.weight_decay=0", "--optim.min_lr=0",
    ],
}  # fmt: skip


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True, help="run folder of a pre-training")
    parser.add_argument("--root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--epochs", type=float, default=20, help="of fine-tuning")
    parser.add_argument("--probe-epochs", type=float, default=90, help="of the full linear probe")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS)
    parser.add_argument("--folder", type=Path, default=Path("runs/fine_tuning"))
    known, flags = parser.parse_known_args()
    config = recognise(known.run).config()
    if config is None:
        raise UserError(f"--run {known.run} is not the folder of a pre-training")
    size = config.model.image_size
    flags += [f"--data.root={known.root}", f"--model.image_size={size}"]
    epochs = {"fine-tuned": known.epochs, "full probe": known.probe_epochs}
    print("| encoder | fine-tuned | linear, full | linear, fast | kNN |\n|---|---|---|---|---|")
    for name in known.encoders:
        weights = (
            known.run / "encoder.safetensors"
            if name == "pre-trained"
            else untrained(config, known.folder / "untrained.safetensors")
        )
        row = [
            fine_tuned(weights, known.folder / name / kind, epochs[kind], flags, kind)
            for kind in ARMS
        ]
        fast = probe(weights, known.folder / name, config.data)
        print(
            f"| {name} | {row[0]:.1f} | {row[1]:.1f} | {fast['linear']:.1f} | {fast['knn']:.1f} |",
            flush=True,
        )


def untrained(config: PretrainConfig, path: Path) -> Path:
    """Write the freshly initialised encoder of a pre-training config, and return its file."""
    if not path.exists():
        torch.manual_seed(config.seed)
        model = MaskedAutoencoder.from_config(config.model, decoder=False)
        export_encoder(model.encoder, path, config.model)
    return path


def fine_tuned(weights: Path, folder: Path, epochs: float, flags: list[str], kind: str) -> float:
    """Train a classifier, one of `ARMS`, on an encoder and return its top-1, in percent."""
    flags = [f"--curriculum={{preset: constant, epochs: {epochs}, cost: area}}", *flags]
    own = [f"--model.checkpoint={weights}", f"--output.dir={folder}"]
    given = [*own, *COMMON, *ARMS[kind], *flags]
    return float(classify(load_config(ClassifierConfig, [], given))["top1"])


def probe(weights: Path, folder: Path, data: DataConfig) -> dict[str, Any]:
    """Score cached features, or read earlier scores."""
    config = ProbeConfig(weights, data=data, pool="cls")
    return kept(folder / "scores.json", lambda: score_encoder(config))


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a file; if it does not exist, compute and write it first."""
    if not path.exists():
        write_text_atomically(path, json.dumps(compute()))
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
