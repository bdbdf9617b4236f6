"""Constant bandwidth against the curriculum, for the same images and for the same compute.

    python benchmarks/equal_images.py --root FOLDER --epochs 8 [--key value ...]

Three arms from the same initial weights: `constant` for the given epochs; `etpp` until it has seen
as many images; `etpp` until it has done as much compute. Each is scored by kNN and a linear probe
beside the untrained encoder. Runs resume; finished arms are not run again. Prints a Markdown table.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from finetune import ProbeConfig, score_encoder
from mae_et import PretrainConfig, load_config, pretrain
from mae_et.atomic import write_text_atomically
from mae_et.datasets import open_source
from mae_et.pretrain import make_plan

HERE = Path(__file__).parent


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--epochs", type=float, default=8, help="epochs of the constant arm")
    parser.add_argument("--config", default=str(HERE / "imagenette128.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/equal_images"))
    known, flags = parser.parse_known_args()
    flags.append(f"--data.root={known.root}")
    rows = [
        run_arm(load_config(PretrainConfig, [known.config], flags), known.folder / name, preset, e)
        for name, preset, e in arms(
            load_config(PretrainConfig, [known.config], flags), known.epochs
        )
    ]
    print(table(rows))


def arms(config: PretrainConfig, epochs: float) -> list[tuple[str, str, float]]:
    """Return name, preset and budget (equivalent epochs) of each arm."""
    images = len(open_source(config.data, "train", config.model.channels))
    probe = make_plan(with_curriculum(config, "etpp", epochs), images)
    equal_images = epochs * epochs * images / probe.images
    return [
        ("constant", "constant", epochs),
        ("etpp-equal-images", "etpp", equal_images),
        ("etpp-equal-compute", "etpp", epochs),
    ]


def with_curriculum(config: PretrainConfig, preset: Any, epochs: float) -> PretrainConfig:
    """Return a config with another curriculum."""
    curriculum = dataclasses.replace(config.curriculum, preset=preset, epochs=epochs)
    return dataclasses.replace(config, curriculum=curriculum)


def run_arm(config: PretrainConfig, folder: Path, preset: str, epochs: float) -> dict[str, Any]:
    """Pre-train and score an arm, or read what it left."""
    output = dataclasses.replace(config.output, folder=folder)
    config = dataclasses.replace(with_curriculum(config, preset, epochs), output=output)
    pretrain(config)
    scores = folder / "scores.json"
    if not scores.exists():
        probe = ProbeConfig(
            folder, data=config.data, untrained=True, workers=config.efficiency.workers,
            precision=config.efficiency.precision,
        )  # fmt: skip
        write_text_atomically(scores, json.dumps(score_encoder(probe)))
    results = json.loads((folder / "results.json").read_text())
    return {"arm": folder.name} | results | json.loads(scores.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Return the arms as Markdown."""
    first = rows[0]
    lines = [
        "| arm | images | equivalent epochs | compute | time | kNN | linear |",
        "|---|---|---|---|---|---|---|",
        f"| untrained | 0 | 0 | 0 | 0 | {first['untrained_knn']} | {first['untrained_linear']} |",
    ]
    for row in rows:
        flops = sum(stage["compute"] for stage in row["stages"])
        base = sum(stage["compute"] for stage in first["stages"])
        seconds = row["training_seconds"]
        lines.append(
            f"| {row['arm']} | {row['images']:,} | {row['equivalent_epochs']:.2f} "
            f"| {flops / base:.2f}x | {seconds:.0f} s ({seconds / first['training_seconds']:.2f}x) "
            f"| {row['knn']:.1f} | {row['linear']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
