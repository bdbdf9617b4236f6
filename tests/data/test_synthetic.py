import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from mae_et.data.sources import synthetic
from mae_et.data.sources.synthetic import CLASSES, Synthetic, render

DIGEST = "03ab6c938a6b271b9f67e3e9e31040c250031e7a0aa693777e535096aebc8c00"

PRINT_DIGEST = """
import hashlib
from mae_et.data.sources.synthetic import render
print(hashlib.sha256(b"".join(render(i, 64)[0].tobytes() for i in range(20))).hexdigest())
"""


def digest(order) -> str:
    """Digest of the images of `order` in ascending order of index, rendered in the order given."""
    images = {index: render(index, 64)[0].tobytes() for index in order}
    return hashlib.sha256(b"".join(images[index] for index in sorted(images))).hexdigest()


def nearest(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Position in `train` of the row nearest to each row of `test`."""
    squares = (train**2).sum(1) - 2 * test @ train.T
    return squares.argmin(1)


def centred(mask: np.ndarray) -> np.ndarray:
    """A mask resampled to 16 x 16 about its centroid, in units of its spread."""
    size = len(mask)
    y, x = np.mgrid[:size, :size]
    weight = mask / mask.sum()
    mean_y, mean_x = (weight * y).sum(), (weight * x).sum()
    spread = np.sqrt((weight * ((y - mean_y) ** 2 + (x - mean_x) ** 2)).sum())
    steps = np.linspace(-2, 2, 16) * spread
    rows = np.clip(np.rint(mean_y + steps), 0, size - 1).astype(int)
    columns = np.clip(np.rint(mean_x + steps), 0, size - 1).astype(int)
    return mask[np.ix_(rows, columns)].ravel()


def test_rendering_gives_the_same_bytes_in_any_order_process_and_version():
    """The images of an index and seed are these very bytes, on any machine."""
    assert digest(reversed(range(20))) == DIGEST
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST], env=environment, capture_output=True, check=True
    )
    assert child.stdout.decode().strip() == DIGEST


def test_index_and_seed_both_matter():
    """Different pairs of index and seed give different images, mirrored pairs included."""
    pairs = [(0, 0), (10, 0), (0, 10), (10, 10), (2**32, 0), (0, 2**32), (2**64 - 1, 2**64 - 1)]
    assert len({render(index, 32, seed)[0].tobytes() for index, seed in pairs}) == len(pairs)


@pytest.mark.parametrize("size", [16, 31, 64, 96])
def test_rendered_images_have_the_documented_shape_and_type(size):
    """An image is uint8 [size, size, 3] at any size, odd ones included."""
    image, label = render(4, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert CLASSES[label] == "star"


def test_an_image_shows_the_same_scene_at_every_size():
    """The object of an index lies at the same place at every size."""
    for index in range(20):
        scene, _ = synthetic._start(index, 0)
        fine = synthetic._coverage(scene, 128).reshape(64, 2, 64, 2).mean((1, 3))
        assert np.abs(fine - synthetic._coverage(scene, 64)).mean() < 0.005


@pytest.mark.parametrize(("first", "length"), [(0, 10), (7, 23), (1234, 95), (5, 1000)])
def test_every_range_of_indices_is_balanced(first, length):
    """In any window of consecutive indices the ten classes' counts differ by at most one."""
    assert len(CLASSES) == len(set(CLASSES)) == 10
    labels = [render(i, 16)[1] for i in range(first, first + length)]
    counts = np.bincount(labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_mean_colour_does_not_predict_the_class():
    """Class means and nearest neighbours of mean colour are right in under 14%; chance is 10%."""
    colour = np.stack([render(i, 32)[0].mean((0, 1)) for i in range(4000)])
    label = np.arange(4000) % 10
    train, test = slice(0, 2000), slice(2000, 4000)
    means = np.stack([colour[train][label[train] == c].mean(0) for c in range(10)])
    assert np.mean(nearest(means, colour[test]) == label[test]) < 0.14
    neighbour = label[train][nearest(colour[train], colour[test])]
    assert np.mean(neighbour == label[test]) < 0.14


def test_silhouettes_predict_the_class():
    """The nearest of a thousand silhouettes, centred and scaled, has the same label in over 95%."""
    masks = [synthetic._coverage(synthetic._start(i, 0)[0], 64) for i in range(1500)]
    features = np.stack([centred(mask) for mask in masks])
    label = np.arange(1500) % 10
    found = label[nearest(features[:1000], features[1000:])]
    assert np.mean(found == label[1000:]) > 0.95


def test_the_dataset_returns_rendered_images():
    """Item i of a dataset is image first + i of its seed, the first time and from memory."""
    data = Synthetic(length=12, size=32, seed=3, first=95)
    assert len(data) == 12
    assert data.classes == CLASSES
    for _ in range(2):
        for i, (image, label) in enumerate(data):
            pixels, expected = render(95 + i, 32, seed=3)
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), pixels)
            assert label == expected
    with pytest.raises(IndexError):
        data[12]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"index": -1, "size": 64}, "index"),
        ({"index": 2**64, "size": 64}, "index"),
        ({"index": 0, "size": 15}, "size"),
        ({"index": 0, "size": 64, "seed": -1}, "seed"),
    ],
)
def test_render_refuses_bad_arguments(arguments, culprit):
    """An argument out of its range is refused by name."""
    with pytest.raises(ValueError, match=culprit):
        render(**arguments)
