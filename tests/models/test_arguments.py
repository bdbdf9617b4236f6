"""Arguments that would be misread are refused, in a sentence that names them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_mae import small

from finetune import HeldOutAccuracy
from mae_et import (
    Curriculum,
    DataConfig,
    Stage,
    extract_features,
    hog,
    low_frequency_crop,
    mask_from_noise,
    normalise,
    train_transform,
)
from mae_et.data.datasets import open_dataset

IMAGES = torch.rand(2, 3, 32, 32)
MODEL: Any = small()
PLAN = Curriculum((Stage(),), 32).plan(9, 9, 9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: low_frequency_crop(IMAGES, (16.5, 16)), "cannot be interpreted as an integer"),
        (lambda: normalise(IMAGES[:, :1], [0.5] * 3, [0.5] * 3), "one for each of 1 channels"),
        (lambda: normalise(IMAGES, (0.5,) * 3, (0.5,)), r"mean and std must .* got 3 and 1"),
        (lambda: hog(IMAGES[0]), "Wrong shape: expected 4 dims. Received 3-dim tensor"),
        (lambda: hog(IMAGES, bins=0), "cell and bins must be at least 1"),
        (lambda: mask_from_noise(torch.rand(2, 8, 8), 0.75), r"noise must be \[B N\], got shape"),
        (lambda: Curriculum((Stage(),), 32, shares_of="steps"), "shares_of must be one of compute"),
        (lambda: Curriculum((Stage(),), 32, patch=0), "patch must lie in"),
        (lambda: Curriculum.preset("etpp", 32, patch=0), r"patch must lie in \[1, inf\), got 0"),
        (lambda: Curriculum((Stage(),), 32).plan(9, 9, 9, lambda side: 0), "cost .* be positive"),
        (lambda: Curriculum((Stage(),), 32).plan(9, 9, 9, lambda side: math.inf), "and finite"),
        (lambda: train_transform(PLAN, 0), r"patch_size 0 does not divide the bandwidths \[32\]"),
        (lambda: train_transform(PLAN, 7), "patch_size 7 does not divide"),
        (lambda: HeldOutAccuracy(images=0), "images must be positive, got 0"),
        (lambda: HeldOutAccuracy(num_workers=-1), "num_workers must not be negative, got -1"),
        (lambda: MODEL.encode(IMAGES[:, :1]), "mat1 and mat2 shapes cannot be multiplied"),
        (lambda: MODEL.encode(IMAGES[..., :31]), "32 x 31 pixels are not tiled by patches"),
        (lambda: small(decoder_depth=0)(IMAGES), "has no decoder: it can encode but not reconstr"),
        (lambda: extract_features(MODEL.encoder, IMAGES, "token"), "pool must be one of mean, cls"),
        (lambda: extract_features(MODEL, IMAGES), "model must be a timm model, got a MaskedAuto"),
        (lambda: open_dataset(DataConfig(), "training"), "split must be one of train, val"),
        (lambda: small(target="edges"), "target must be one of 'pixel', 'norm_pix', 'hog', got"),
        (lambda: small(positions="full"), "positions must be one of 'full_grid', 'own_grid'"),
        (lambda: small(decoder_share=2.0), r"decoder_share must lie in \(0, 1\]"),
        (lambda: small(mask_ratio=1.0), r"mask_ratio must lie in \(0, 1\)"),
        (lambda: small(target="hog", hog_cell=5), "hog_cell 5 does not divide the patch size 8"),
        (lambda: small(hog_cell=0), "hog_cell must be positive"),
        (lambda: small(decoder_depth=-1), r"decoder_depth must lie in \[1, 1000\]"),
        (lambda: small(position_grid=-1), "position_grid must be positive"),
        (lambda: small(decoder_embed_dim=30), "decoder_embed_dim 30 must be a multiple of 4"),
        (lambda: small(image_size=(32, 36)), "image_size 36 is not a multiple of the patch"),
    ],
)
def test_misread_arguments_are_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=sentence):
        call()


def test_numbers_of_numpy_and_lists_are_taken_as_those_of_python() -> None:
    statistics = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    expected = normalise(IMAGES, *map(tuple, statistics))
    for mean, std in (statistics, map(np.array, statistics)):
        assert torch.equal(normalise(IMAGES, mean, std), expected)
    assert torch.equal(low_frequency_crop(IMAGES, np.int64(16)), low_frequency_crop(IMAGES, 16))
