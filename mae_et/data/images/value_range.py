"""Warn if images use little of the value range that they are read with."""

import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mae_et.config.data import DataConfig
from mae_et.data.evenly_spaced import evenly_spaced
from mae_et.data.images.channels import (
    SIXTEEN_BIT_MODES,
    SIXTEEN_BITS,
    has_deep_colours,
    unread_bands,
)
from mae_et.data.images.decoding import DecodedDataset, open_image
from mae_et.errors import UserError
from mae_et.runtime.console import notify

SAMPLES = 8
MAX_DEVIATIONS = 50
MIN_DEVIATIONS = 0.1


class Range(NamedTuple):
    """The values of an image, before any scaling."""

    kind: str
    """8-bit images, 16-bit images, 16-bit colours (their high byte), or arrays of a dtype."""
    low: np.ndarray
    high: np.ndarray
    """Lowest and highest value of each channel, [C]; [1] for grey. Of 16-bit images, `high` is the
    highest value below 65535, which often marks missing pixels, and the highest, [2]."""
    frames: int = 1
    """Number of images in the file."""


EIGHT_BITS = Range("8-bit images", np.zeros(1), np.full(1, 255))


def check_range(dataset: DecodedDataset, config: DataConfig) -> None:
    """Inspect some images, including the first; warn of unusual ranges and of multiple frames.

    Statistics of images must be those of values in [0, 1]. 16-bit images should reach the upper
    half of their range (10 to 14 bits in 16-bit files do not), and arrays should lie within 50
    standard deviations (`data.std`) of `data.mean` and span at least 0.1. Unreadable images are
    skipped.
    """
    found = list(_ranges(dataset))
    if any(not each.kind.endswith("arrays") for each in found):
        check_image_statistics(config)
    frames = max((each.frames for each in found), default=1)
    if frames > 1:
        notify(f"files hold up to {frames} images: the first image of each is read")
    found = [each for each in found if each.kind != EIGHT_BITS.kind]
    for kind in dict.fromkeys(each.kind for each in found):
        same = [each for each in found if each.kind == kind]
        low, high = np.min([r.low for r in same], 0), np.max([r.high for r in same], 0)
        if kind == "16-bit images":
            _check_integers(high[0], high[1], config.max_value or SIXTEEN_BITS)
        elif kind == "16-bit colours":
            _check_colours(high.item())
        else:
            _check_array(kind, low, high, config)


def check_image_statistics(config: DataConfig) -> None:
    """Refuse statistics that images scaled to [0, 1] cannot have."""
    for name, values in (("mean", config.mean), ("std", config.std)):
        if max(values) > 1:
            raise UserError(
                f"data.{name} {list(values)} is above 1: images are scaled to [0, 1], so divide "
                "statistics of values from 0 to 255 by 255"
            )


def _ranges(dataset: DecodedDataset) -> Iterator[Range]:
    for index in evenly_spaced(len(dataset), SAMPLES):
        try:
            content = dataset.inner[index][0]
            found = _range_of(content) if isinstance(content, bytes) else None
        except Exception:
            continue
        if found is not None:
            yield found


def _range_of(content: bytes) -> Range | None:
    """Return the range of an image or an array; None for those that reading will refuse."""
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.ndim not in {2, 3} or array.dtype.kind not in "buif":
            return None
        if array.dtype == np.uint8:
            return EIGHT_BITS
        pixels = array.reshape(-1, array.shape[2] if array.ndim == 3 else 1).astype(float)
        return Range(f"{array.dtype} arrays", pixels.min(0), pixels.max(0))
    with open_image(content) as image:
        # Other frames of an MPO are previews or depth maps.
        if bands := unread_bands(image):
            notify(f"TIFF files hold {bands} more bands than colours, not read: save all as .npy")
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if has_deep_colours(image):
            high = np.asarray(image.convert("RGB")).max(keepdims=True).reshape(1)
            return Range("16-bit colours", np.zeros(1), high, frames)
        if image.mode in SIXTEEN_BIT_MODES:
            array = np.asarray(image)
            if array.min() < 0 or array.max() > SIXTEEN_BITS:
                return None
            high = np.array([array.max(where=array < SIXTEEN_BITS, initial=0), array.max()], float)
            return Range("16-bit images", np.zeros(1), high, frames)
    return EIGHT_BITS._replace(frames=frames)


def _check_integers(usual: float, high: float, max_value: float) -> None:
    if high > max_value:
        _warn(
            f"16-bit images reach {high:g}, above data.max_value {max_value:g}: what is above it "
            "becomes white"
        )
    elif 0 < 2 * usual < max_value:
        apart = "" if high == usual else f", apart from {high:g}"
        _warn(
            f"the first 16-bit images reach {usual:g} of {max_value:g}{apart}: if they have fewer "
            f"bits, give data.max_value {_white(usual)}"
        )


def _check_colours(high: float) -> None:
    if high < 128:
        _warn(
            f"the first images with 16-bit colours reach {high:g} of 255: if they have fewer bits, "
            "save them as .npy and give data.max_value"
        )


def _white(high: float) -> int:
    """Return the white of the smallest common bit depth that fits a value."""
    return next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)


def _check_array(kind: str, low: np.ndarray, high: np.ndarray, config: DataConfig) -> None:
    mean, std = np.array(config.mean), np.array(config.std)
    if len(low) not in {1, len(mean)} and len(mean) != 1:
        return  # [C H W], which reading will refuse
    scale = 1 if config.max_value is None else config.max_value
    values = f"{kind} [H W C] with values from {low.min():g} to {high.max():g}"
    notify(
        f"{values} are divided by {scale:g} (data.max_value), then normalised by data.mean and "
        "data.std"
    )
    lowest, highest = ((value / scale - mean) / std for value in (low, high))
    far, near = np.abs([lowest, highest]).max(), (highest - lowest).max()
    if far > MAX_DEVIATIONS or 0 < near < MIN_DEVIATIONS:
        _warn(
            f"{values} become {lowest.min():.3g} to {highest.max():.3g} standard deviations: give "
            "data.max_value, or data.mean and data.std in units of the arrays"
        )


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
