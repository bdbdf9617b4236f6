"""Choose where JPEGs are decoded: on the GPU, and by which library, or in loader processes."""

from typing import Any, Literal

import torch
from torch import Tensor

from mae_et.data.decoding import DecodedDataset
from mae_et.data.device_decode import Decode, DeviceDecoder
from mae_et.data.encoded import is_usual_jpeg
from mae_et.data.notices import notify
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import UserError

PROBED = 16
"""Images whose format is looked at to decide where to decode."""


def choose_decoder(
    requested: Literal["auto", "cpu", "gpu"], dataset: Any, device: torch.device
) -> DeviceDecoder | None:
    """Return the decoder of a run, None to decode in loader processes, and print which and why.

    Args:
        requested: see `EfficiencyConfig.decode`.
        dataset: augmented dataset.
        device: the run's.

    Raises:
        UserError: the GPU is requested and cannot decode for this run.
    """
    if requested == "cpu" or (requested == "auto" and device.type != "cuda"):
        return None
    reason = _unsuited(dataset, device)
    if reason is None and requested == "auto" and not _mostly_jpegs(dataset.source):
        reason = "the images are not mostly JPEGs"
    if reason is None:
        found = _find_decoder(device)
        if found is not None:
            name, decode = found
            notify(f"JPEGs are decoded by the GPU ({name}; efficiency.decode {requested})")
            return DeviceDecoder(device, dataset.sides, decode)
        reason = (
            "neither TorchCodec (the extra gpu: pip install '.[gpu]') nor torchvision decodes a "
            "JPEG there"
        )
    if requested == "gpu":
        raise UserError(f"efficiency.decode gpu is not possible: {reason}")
    notify(f"images are decoded by the CPU (efficiency.decode auto): {reason}")
    return None


def _unsuited(dataset: Any, device: torch.device) -> str | None:
    """Return why a run cannot decode on the GPU; None if it can."""
    if device.type != "cuda":
        if torch.cuda.is_available():
            return "the run is on the CPU (efficiency.device)"
        return "torch sees no CUDA device"
    if not isinstance(dataset, TrainDataset):
        return "only pre-training does so"
    if not isinstance(dataset.source, DecodedDataset):
        return "the images are in memory, not in files"
    if dataset.source.channels != 3:
        return f"model.channels is {dataset.source.channels}, not 3"
    if dataset.config.augment:
        return "RandAugment (data.augment) runs on the CPU"
    if dataset.config.replay:
        return "data.replay keeps images on the CPU, and is not needed with a fast decoder"
    return None


def _mostly_jpegs(source: DecodedDataset) -> bool:
    """Return whether at least half of some images, evenly spread, are usual JPEGs."""
    indices = sorted({n * len(source) // PROBED for n in range(PROBED)})
    return 2 * sum(is_usual_jpeg(source, index) for index in indices) >= len(indices)


def _find_decoder(device: torch.device) -> tuple[str, Decode] | None:
    """Return the first library that decodes a small JPEG on a device, and its name."""
    from torchvision.io import encode_jpeg

    jpeg = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
    for name, decode in (("TorchCodec", _decode_torchcodec), ("torchvision", decode_torchvision)):
        try:
            images = decode([jpeg, jpeg], device)
        except Exception:  # not installed, without CUDA, or no nvJPEG for this GPU
            continue
        if [tuple(image.shape) for image in images] == [(3, 16, 16)] * 2:
            return name, decode
    return None


def _decode_torchcodec(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg(contents, mode="RGB", device=device)


def decode_torchvision(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode with torchvision, whose decoders are deprecated since 0.29."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(contents, ImageReadMode.RGB, device)
