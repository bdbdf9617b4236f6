"""A folder of images, the config of a small model, and the printed JSON."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder of two classes of noise, for training and for validation."""
    draw = random.Random(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("dark", "light"):
            folder = tmp_path / "photographs" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = bytes(draw.randrange(128) + 127 * (name == "light") for _ in range(3072))
                Image.frombytes("RGB", (32, 32), noise).save(folder / f"{number}.png")
    return tmp_path / "photographs"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return the path of the config of a small model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {encoder: vit_tiny_patch16_224, image_size: 64, encoder_embed_dim: 32, "
        "encoder_depth: 2, encoder_num_heads: 2, decoder_embed_dim: 16, decoder_depth: 1, "
        "decoder_num_heads: 2}\n"
        "data: {eval_crop: 1.0}\n"
        "optim: {batch_size: 8}\n"
        "efficiency: {num_workers: 0, device: cpu, precision: fp32}\n"
    )
    return path


@pytest.fixture
def last_json(capsys) -> Callable[[], Any]:
    """Return a function that parses the last line printed."""
    return lambda: json.loads(capsys.readouterr().out.splitlines()[-1])
