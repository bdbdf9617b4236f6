"""Supervised EfficientTrain++ against constant bandwidth, for the same images and the same compute.

    python benchmarks/supervised.py --root FOLDER --epochs 4 [--key value ...]

Three arms from the same initial weights: `constant`, `etpp` at equal images, and `etpp` at equal
compute. Finished arms are not repeated. Prints a Markdown table.
"""

import argparse
from pathlib import Path

from finetune import ClassifierConfig, classify
from finetune.image_size import height_and_width
from mae_et import Curriculum, load_config

COMMON = """
model: {backbone: resnet18, image_size: 128}
data: {eval_crop: 1.0, scale: [0.2, 1.0]}
optim: {batch_size: 64, base_lr: 4.0e-3, warmup_fraction: 0.1, weight_decay: 0.05}
recipe: {smoothing: 0.1}
output: {evaluate_every: 25%, checkpoint_every: 10%, log_every: 50}
"""


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--epochs", type=float, default=4, help="epochs of the constant arm")
    parser.add_argument("--folder", type=Path, default=Path("runs/supervised"))
    known, flags = parser.parse_known_args()
    known.folder.mkdir(parents=True, exist_ok=True)
    common = known.folder / "common.yaml"
    common.write_text(COMMON)
    config = load_config(ClassifierConfig, [common], flags)
    side = min(height_and_width(config.model.image_size))
    probe = Curriculum.preset("etpp", side, 32).plan(known.epochs, 10_000, 1)
    equal_images = known.epochs**2 * 10_000 / probe.images
    print("| arm | images | compute | time | top-1 |\n|---|---|---|---|---|")
    first = None
    for name, preset, epochs in (
        ("constant", "constant", known.epochs),
        ("etpp-equal-images", "etpp", equal_images),
        ("etpp-equal-compute", "etpp", known.epochs),
    ):
        curriculum = f"--curriculum={{preset: {preset}, epochs: {epochs}, cost: area}}"
        given = [f"--data.root={known.root}", f"--output.dir={known.folder / name}", curriculum]
        row = classify(load_config(ClassifierConfig, [common], [*given, *flags]))
        first = first or row
        print(
            f"| {name} | {row['train_images']:,} | {row['compute'] / first['compute']:.2f}x "
            f"| {row['training_seconds']:.0f} s "
            f"({row['training_seconds'] / first['training_seconds']:.2f}x) | {row['top1']:.1f} |"
        )


if __name__ == "__main__":
    main()
