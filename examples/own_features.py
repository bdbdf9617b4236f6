"""Score an encoder's features of your own images: nearest neighbours and a linear probe.

Seconds on a CPU, on embedded images: python examples/own_features.py [CHECKPOINT]. Any checkpoint
that `mae_et.load_encoder` reads; without one, a network with random weights is scored.
"""

import sys
from collections.abc import Iterable

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune
import mae_et
from mae_et.data.sources.synthetic import render


def images(first: int, count: int, side: int) -> TensorDataset:
    """Return uint8 images [N 3 side side] and labels [N]; yours come from any dataset."""
    samples = [render(number, side) for number in range(first, first + count)]
    pixels = torch.stack([torch.from_numpy(image) for image, _ in samples])
    return TensorDataset(pixels.movedim(-1, 1), torch.tensor([label for _, label in samples]))


def features_of(encoder: nn.Module, loader: Iterable[list[Tensor]]) -> finetune.Features:
    """Return the features [N D] and labels [N] of a loader's images."""
    data = mae_et.DataConfig()  # give the mean and std that the encoder was trained with
    vectors, labels = [], []
    for pixels, classes in loader:
        pixels = mae_et.normalise(pixels, data.mean, data.std)
        vectors.append(mae_et.extract_features(encoder, pixels))
        labels.append(classes)
    return finetune.Features(torch.cat(vectors), torch.cat(labels))


def scores(encoder: nn.Module, side: int) -> dict[str, float]:
    """Return the accuracies of an encoder's features, in percent."""
    train, val = (
        features_of(encoder, DataLoader(images(*which, side), batch_size=64))
        for which in ((0, 400), (400, 200))
    )
    return {
        "knn": finetune.knn_accuracy(train, val),
        "linear": finetune.probe_features(train, val, epochs=20).accuracy,
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        encoder = mae_et.load_encoder(sys.argv[1])
    else:
        settings = {"img_size": 32, "patch_size": 8, "num_classes": 0}
        encoder = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    for name, accuracy in scores(encoder, encoder.patch_embed.img_size[0]).items():
        print(f"{name} {accuracy:.1f}%")
