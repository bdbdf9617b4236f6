import runpy
from pathlib import Path

import timm
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "own_features.py"


def test_features_of_one_s_own_images_are_scored() -> None:
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "num_classes": 0}
    encoder = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    scores = runpy.run_path(str(SCRIPT))["scores"](encoder, 32)
    assert set(scores) == {"knn", "linear"}
    assert all(5 < accuracy < 95 for accuracy in scores.values())  # random weights, ten classes
