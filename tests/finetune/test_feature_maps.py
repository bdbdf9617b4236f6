"""Patch features as colours."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.io import read_image

from finetune.embedding.maps import feature_colours, principal_components
from mae_et.cli.main import main


def test_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    points = torch.randn(200, 7, dtype=torch.float64) * torch.arange(1.0, 8)
    expected = PCA(3).fit_transform(points.numpy())
    found = principal_components(points, 3).numpy()
    for ours, theirs in zip(found.T, expected.T, strict=True):
        sign = np.sign((ours * theirs).sum())
        np.testing.assert_allclose(ours, sign * theirs, atol=1e-9)


def test_like_patches_have_like_colours_in_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (4, 6, 6), generator=generator)
    features = 10 * torch.eye(8)[kinds] + 0.1 * torch.randn(4, 6, 6, 8, generator=generator)
    colours = feature_colours(features).movedim(1, -1)
    torch.testing.assert_close(feature_colours(features * 1e-30).movedim(1, -1), colours)
    assert colours.min() >= 0
    assert colours.max() <= 1
    means = torch.stack([colours[kinds == kind].mean(0) for kind in range(3)])
    within = max((colours[kinds == kind][:, :2] - means[kind, :2]).abs().max() for kind in range(3))
    between = torch.pdist(means[:, :2]).min()
    assert between > 3 * within


def test_the_foreground_is_the_part_near_the_centre() -> None:
    features = torch.randn(3, 8, 8, 5) * 0.1
    features[:, 2:6, 2:6, 0] += 10
    blank = (feature_colours(features, foreground=True) == 1).all(1)
    assert not blank[:, 2:6, 2:6].all()
    blank[:, 2:6, 2:6] = True
    assert blank.all()


def test_the_command_draws_any_images_of_any_encoder(tmp_path: Path, capsys) -> None:
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=48, num_heads=3, img_size=32,
        patch_size=8,
    )  # fmt: skip
    save_file(dict(network.state_dict()), tmp_path / "weights.safetensors")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    flags = [f"--images={tmp_path / 'photos'}", "--encoder_num_heads=3", "--num_workers=0"]
    save = f"--save={tmp_path / 'map.png'}"
    given = ["preview", "--features", str(tmp_path / "weights.safetensors"), *flags, save]
    assert main([*given, "--image_size=[48, 32]"]) == 0
    rows, columns, panel = 2, 4, 224
    size = (3, 28 + 16 + 8 + rows * (panel + 8), 8 + columns * (panel + 8))
    assert read_image(str(tmp_path / "map.png")).shape == size
    assert main([*given, "--layer=2"]) == 2
    assert "layer 2: the encoder has blocks 1 to 1" in capsys.readouterr().err
