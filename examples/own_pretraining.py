"""Pre-train on images, and towards a target, of your own: with resume, records and probes.

python examples/own_pretraining.py IMAGES.npy RUN, where IMAGES.npy holds uint8 [N H W 3]. The same
command resumes; on several GPUs, start it with torchrun --nproc-per-node. `mae-et status` and
`report` read the run folder as any other; `mae-et knn RUN --data.root FOLDER` scores it on images
in a folder.
"""

import sys
from pathlib import Path

import numpy as np
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch import Tensor

import mae_et


class Photographs:
    """A map-style dataset: an index gives a PIL image, or the bytes of a file, and a label."""

    def __init__(self, path: Path):
        self.pixels = np.load(path, mmap_mode="r")  # not copied by loader processes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), -1  # -1: no label


class EdgeAutoencoder(mae_et.MaskedAutoencoder):
    """Predicts what a blur removes, in place of the pixels."""

    def targets(self, images: Tensor) -> Tensor:
        """Return the targets of normalised images [B C H W], float32 [B N D]."""
        return super().targets(images - tv.gaussian_blur(images, [5, 5]))


class EdgePretraining(mae_et.Pretraining):
    """Pre-training with other images and another model; other methods can be overridden too."""

    dataset: Photographs
    model = EdgeAutoencoder

    def open_images(self) -> mae_et.DecodedDataset:
        """Return the training images."""
        return mae_et.DecodedDataset(self.dataset)


def main(images: Path, folder: Path, recipe: str = "demo", *flags: str) -> Path:
    """Pre-train with a recipe's settings, and return the run folder."""
    flags = (f"--output.dir={folder}", f"--data.name={images.stem}", *flags)
    task = EdgePretraining(mae_et.load_config(mae_et.PretrainConfig, recipe, flags))
    task.dataset = Photographs(images)
    mae_et.train_run(task)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
