"""Compare mae-et's figures with those of other libraries and papers: the table of docs/compared.md.

python tests/support/compared.py            # every row
python tests/support/compared.py hog knn    # rows whose name contains a word
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from oracles import fft_crop
from PIL import Image
from safetensors.torch import load_file
from skimage.data import astronaut
from skimage.filters import sobel
from skimage.metrics import peak_signal_noise_ratio
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tiny_run import GOLDEN
from torchvision.transforms import RandomResizedCrop
from transformers import Dinov2Config, Dinov2Model, ViTMAEForPreTraining

from finetune import Features, knn_accuracy, probe_features
from finetune.config import NetworkConfig
from finetune.training.model import build_classifier
from finetune.training.param_groups import parameter_groups
from mae_et import (
    Curriculum,
    MaskedAutoencoder,
    export,
    hog,
    load_encoder,
    load_pretrained,
    low_frequency_crop,
    mask_from_noise,
)
from mae_et.config.schema import OptimConfig
from mae_et.curriculum.flops import training_flops
from mae_et.data.images.jpeg_crop import random_box
from mae_et.training.optim import build_optimizer, lr_at

TINY = GOLDEN / "mae_tiny_released_format.pth"


class Row(NamedTuple):
    """One figure of ours beside another's."""

    what: str
    other: str
    ours: float
    theirs: float
    difference: float
    """Largest difference of any element; of `ours` and `theirs` where they are the whole."""
    allowed: float


def photograph() -> torch.Tensor:
    """Return scikit-image's astronaut at 224 x 224, [3 224 224] in [0, 1]."""
    image = Image.fromarray(astronaut()).resize((224, 224), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def tensors(what: str, other: str, ours: torch.Tensor, theirs: Any, allowed: float) -> Row:
    """Compare elementwise; the figures shown are means of absolute values."""
    theirs = torch.as_tensor(theirs)
    difference = (ours.double() - theirs.double()).abs().max().item()
    mean = [x.double().abs().mean().item() for x in (ours, theirs)]
    return Row(what, other, *mean, difference, allowed)


def numbers(what: str, other: str, ours: float, theirs: float, allowed: float) -> Row:
    """Compare two numbers."""
    return Row(what, other, ours, theirs, abs(ours - theirs), allowed)


def crop_fourier() -> Row:
    image = photograph()
    theirs = fft_crop(image.double().numpy(), 96)
    return tensors("crop, 224 to 96", "numpy.fft", low_frequency_crop(image, 96), theirs, 5e-6)


def crop_resize() -> Row:
    """Fidelity to the exact crop at 160, in dB: the released code resizes with Pillow."""
    image = photograph()
    exact = low_frequency_crop(image.double(), 160).numpy()
    whole = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    lanczos = np.asarray(whole.resize((160, 160), Image.Resampling.LANCZOS)) / 255
    ours, theirs = (
        float(peak_signal_noise_ratio(exact, x.astype(np.float64), data_range=1.0))
        for x in (low_frequency_crop(image, 160, "resize").numpy(), lanczos.transpose(2, 0, 1))
    )
    return numbers("resize, PSNR to the exact crop at 160, dB", "Pillow, Lanczos", ours, theirs, 1)


def hog_sobel() -> Row:
    # Cropped to floats: gradients of 8-bit images often lie on the edge of a bin.
    image = low_frequency_crop(photograph(), 96)
    gradients = [
        np.stack([4 * sobel(each.double().numpy(), axis=axis, mode="mirror") for each in image])
        for axis in (1, 0)
    ]
    magnitude = np.hypot(*gradients)
    bins = np.floor(np.arctan2(*gradients) / np.pi * 9).astype(int) % 9
    histogram = np.zeros((3, 9, 12, 12))
    for orientation in range(9):
        kept = np.where(bins == orientation, magnitude, 0)
        histogram[:, orientation] = kept.reshape(3, 12, 8, 12, 8).sum((2, 4))
    norm = np.linalg.norm(histogram, axis=1, keepdims=True)
    theirs = torch.from_numpy(histogram / np.maximum(norm, 1e-12))
    ours = hog(image[None])[0]
    # In float32 a gradient on the edge of a bin may fall to either side of it.
    difference = (ours - theirs).abs().double().quantile(0.999).item()
    mean = [x.abs().double().mean().item() for x in (ours, theirs)]
    return Row("HOG (99.9% of the bins)", "scikit-image's Sobel, NumPy", *mean, difference, 1e-5)


def mae_loss() -> Row:
    golden = load_file(GOLDEN / "mae_tiny_expected.safetensors")
    model = load_pretrained(TINY, 3, 4, target="norm_pix")
    loss = model(golden["images"], mask_from_noise(golden["noise"], 0.75)).loss
    theirs = golden["norm_pix.loss"].item()
    return numbers("MAE loss", "facebookresearch/mae", loss.item(), theirs, 1e-5)


def mae_training() -> Row:
    golden = load_file(GOLDEN / "mae_tiny_six_adamw_steps.safetensors")
    losses, _ = six_adamw_steps(golden["lr"].tolist())
    what, other = "losses of 6 AdamW steps", "facebookresearch/mae"
    return tensors(what, other, losses, golden["losses"], 1e-5)


def six_adamw_steps(rates: list[float]) -> tuple[torch.Tensor, MaskedAutoencoder]:
    """Train the tiny released model on the images that the golden file was made with."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(6, 8, 3, 64, 64, generator=generator)
    noise = torch.rand(6, 8, 64, generator=generator)
    model = load_pretrained(TINY, 3, 4, target="norm_pix")
    optimizer = build_optimizer(model, OptimConfig())
    losses = []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(images[step], mask_from_noise(noise[step], 0.75)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model


def hugging_face() -> Row:
    golden = load_file(GOLDEN / "mae_tiny_expected.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        written = export(TINY, "hf", Path(folder) / "hf", encoder_num_heads=3, decoder_num_heads=4)
        theirs = ViTMAEForPreTraining.from_pretrained(written).eval()
    with torch.no_grad():
        logits = theirs(golden["images"], noise=golden["noise"]).logits
        mask = mask_from_noise(golden["noise"], 0.75)
        ours = load_pretrained(TINY, 3, 4)(golden["images"], mask, every_patch=True).prediction
    return tensors("predictions of every patch", "transformers, ViTMAE", ours, logits, 1e-5)


def timm_features() -> Row:
    torch.manual_seed(0)
    model = MaskedAutoencoder("vit_tiny_patch16_224", decoder_depth=0).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(model.encoder.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        return tensors("features, ViT-Ti/16 at 224", "timm", model.encode(images), expected, 1e-5)


def clouds(count: int, seed: int) -> Features:
    """Return points about four centres, which overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 4
    noise = 1.5 * torch.randn(count, 16, generator=generator)
    return Features(centres[labels] + noise, labels)


def knn() -> Row:
    train, val = clouds(2000, 1), clouds(1000, 2)
    theirs = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(train.vectors.numpy(), train.labels.numpy())
    score = 100 * float(theirs.score(val.vectors.numpy(), val.labels.numpy()))
    return numbers("kNN accuracy, %", "scikit-learn", knn_accuracy(train, val), score, 1e-3)


def linear_probe() -> Row:
    """Two optimizers of one problem, so within the standard error of 1000 images."""
    train, val = clouds(2000, 1), clouds(1000, 2)
    theirs = LogisticRegression(max_iter=1000).fit(train.vectors.numpy(), train.labels.numpy())
    score = 100 * float(theirs.score(val.vectors.numpy(), val.labels.numpy()))
    ours = probe_features(train, val, epochs=30).accuracy
    return numbers("linear probe accuracy, %", "scikit-learn", ours, score, 1.5)


def random_resized_crop() -> Row:
    """Mean area of 20,000 boxes; the allowed difference is four standard errors."""
    torch.manual_seed(0)
    image, scale, ratio, count = torch.empty(3, 375, 500), (0.2, 1.0), (3 / 4, 4 / 3), 20_000
    draws = torch.rand(count, 40, dtype=torch.float64).tolist()
    boxes = [random_box(375, 500, scale, ratio, each) for each in draws]
    ours = [box.height * box.width / (375 * 500) for box in boxes]
    sizes = [RandomResizedCrop.get_params(image, list(scale), list(ratio))[2:] for _ in boxes]
    theirs = [height * width / (375 * 500) for height, width in sizes]
    error = 4 * float(np.std(ours)) * math.sqrt(2 / count)
    name = "mean area of random-resized crops"
    return numbers(name, "torchvision", float(np.mean(ours)), float(np.mean(theirs)), error)


def learning_rate() -> Row:
    points = json.loads((GOLDEN / "mae_cosine_lr.json").read_text())
    ours = torch.tensor([lr_at(epoch / 800, OptimConfig()) for epoch, _ in points]).double()
    theirs = torch.tensor([rate for _, rate in points]).double()
    return tensors("learning rates of 800 epochs", "facebookresearch/mae", ours, theirs, 1e-9)


def layer_decay() -> Row:
    golden = json.loads((GOLDEN / "layer_decay_vit_base_0.65.json").read_text())
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=1000, global_pool="avg")
    ours = sorted(group["lr_scale"] for group in parameter_groups(model, 0.05, 0.65))
    theirs = sorted(group["lr_scale"] for group in golden)
    name = "layer decay factors, ViT-B"
    found, expected = torch.tensor(ours).double(), torch.tensor(theirs).double()
    return tensors(name, "facebookresearch/mae", found, expected, 1e-7)


def parameters() -> Row:
    with torch.device("meta"):
        encoder = MaskedAutoencoder("vit_base_patch16_224", decoder_depth=0).encoder
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    return numbers("parameters of ViT-B/16, millions", "timm, vit_base_patch16_224.mae", millions,
                   85.8, 0.05)  # fmt: skip


def flops() -> Row:
    """Multiply-adds of an encoder that sees every patch: a third of a step's, two FLOPs each."""
    with torch.device("meta"):
        encoder = MaskedAutoencoder("vit_base_patch16_224", decoder_depth=0)
    giga = training_flops(encoder.encode)(224) / 3 / 2 / 1e9
    return numbers("multiply-adds of ViT-B/16 at 224, 10^9", "DeiT (2012.12877)", giga, 17.6, 0.3)


def swin_flops() -> Row:
    """FLOPs of Swin-T at 96 pixels, whose window is 3 there as in EfficientTrain++'s release."""
    name = "swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        ours = build_classifier(NetworkConfig(backbone=name), 1000)
        theirs = timm.create_model(name, img_size=96, window_size=3)
    found, expected = (training_flops(network)(96) / 3 / 1e9 for network in (ours, theirs))
    return numbers("FLOPs of Swin-T at 96, 10^9", "timm, window 3", found, expected, 0.02)


def dinov2_features() -> Row:
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    theirs = Dinov2Model(config).eval()
    torch.manual_seed(0)  # versions initialise differently
    for weight in theirs.parameters():
        torch.nn.init.uniform_(weight, -0.5, 0.5)
    images = torch.randn(2, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder)
        features = load_encoder(folder).forward_features(images)
        expected = theirs(images).last_hidden_state
    return tensors("tokens of a DINOv2 encoder", "transformers, Dinov2", features, expected, 1e-5)


def released_stages() -> Row:
    """FLOPs of the stages of EfficientTrain++'s release, whose epochs share the compute by area."""
    with torch.device("meta"):
        model = MaskedAutoencoder("vit_base_patch16_224", target="hog")
        flops = training_flops(partial(model, every_patch=True))
    stages = Curriculum.preset("etpp", 224, 16).plan(400, 1_281_167, 4096).stages
    epochs = [(stage.bandwidth, stage.steps * 4096 / 1_281_167) for stage in stages]
    saved = 1600 * flops(224) / sum(each * flops(bandwidth) for bandwidth, each in epochs)
    name = "times fewer FLOPs by the released stages than in 1600 epochs"
    return numbers(name, "EfficientTrain++, table 15", saved, 3.98, 0.03)


ROWS: tuple[Callable[[], Row], ...] = (
    crop_fourier, crop_resize, hog_sobel, mae_loss, mae_training, hugging_face, timm_features,
    dinov2_features, knn, linear_probe, random_resized_crop, learning_rate, layer_decay, parameters,
    flops, swin_flops, released_stages,
)  # fmt: skip


def line(compare: Callable[[], Row]) -> str:
    """Format a comparison as a row of the page's table."""
    row = compare()
    return (
        f"| {row.what} | {row.other} | {row.ours:.6g} | {row.theirs:.6g} | {row.difference:.1e} | "
        f"{row.allowed:.1e} | `{compare.__name__}` |"
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    for each in ROWS:
        if not words or any(word in each.__name__ for word in words):
            print(line(each), flush=True)
