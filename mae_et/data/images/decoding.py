"""Decode files to images with a given number of channels."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mae_et.config.refusals import one_sentence
from mae_et.data.images.boxes import BoxSampler
from mae_et.data.images.channels import PIL_MODES, to_channels
from mae_et.data.layout import ARRAYS, EXTENSIONS
from mae_et.errors import RunFailed, Unreadable, UserError
from mae_et.runtime.console import printable

if TYPE_CHECKING:
    from torch import Tensor

Sample = tuple["Image.Image | Tensor", int]

UNLABELLED = -1
MAX_PIXELS = 2**29
"""Largest image: 1.6 GB in RGB, twice that during conversion; 20,000 x 20,000 pixels fit."""
Image.init()
# Formats recognised by content, whatever the file's name. Not all that Pillow knows: EPS would
# start another program.
FORMATS = tuple(
    kind
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
    if kind in Image.OPEN  # a build may lack some
)


class DecodedDataset:
    """Decode the images of a dataset that stores them encoded, or as PIL images of any mode.

    It is an `ImageDataset`, such as `Pretraining.open_images` returns.

    Args:
        inner: map-style, `inner[i] -> (image, label)`: a PIL image, or the bytes of an image or of
            a .npy file; a label from 0, or -1 for none. If it has `labels`, they are those of all
            images, [N]; the bytes of its `identity()` recognise the images when a run resumes, and
            its `names_in(root)` are their names in a file of features.
        classes: names of the classes; empty without labels.
        channels: number of channels to decode to.
        name: maps an index to the image's name, for error messages.
        max_value: value of a .npy file that counts as white; by default that of its type.
    """

    def __init__(
        self,
        inner: Any,
        classes: Sequence[str] = (),
        channels: int = 3,
        name: Callable[[int], object] = "image {}".format,
        max_value: float | None = None,
    ):
        self.inner, self.classes, self.channels, self.name = inner, classes, channels, name
        self.max_value = max_value

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Label of each image; see `ImageDataset`."""
        listed = getattr(self.inner, "labels", None)
        return None if listed is None else np.asarray(listed)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # raises IndexError outside, like a list
        with self.naming_errors(index):
            content, label = self.inner[index]
            return decode(content, self.channels, self.max_value), int(label)

    def read_for_crop(
        self, index: int, sample_box: BoxSampler, size: int
    ) -> tuple[Any, int, BoxSampler]:
        """Return the stored copy of an image that is best for a crop of `size` pixels.

        Returns:
            Encoded bytes or a PIL image, its label, and the sampler of the same box in that copy.
        """
        content, label = self.inner[index]
        return content, int(label), sample_box

    @contextlib.contextmanager
    def naming_errors(self, index: int) -> Iterator[None]:
        """Turn a decoder's errors into `Unreadable`, with the name of the image."""
        try:
            yield
        except (UserError, RunFailed):
            raise
        except Exception as error:  # decoders raise many types for damaged files
            sentence = f"cannot read the image {self.name(index)}: {one_sentence(error)}"
            raise Unreadable(printable(sentence)) from None


def check_sample(source: Any) -> None:
    """Refuse a dataset of a user's code whose first sample is not an image and a label.

    Mistakes in its code are raised; an image that cannot be read is not one.
    """
    try:
        found = source.inner[0] if isinstance(source, DecodedDataset) and len(source) else (b"", 0)
    except (AttributeError, ImportError, NameError, NotImplementedError):
        raise
    except Exception:  # decoders raise many types for damaged files
        return
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    if not pair or not isinstance(found[0], (bytes, Image.Image)):
        what = [type(each).__name__ for each in found] if pair else type(found).__name__
        raise UserError(
            "a sample of a dataset gives (image, label), a PIL image or the bytes of a file, and a "
            f"number; the first gave a {what}: return (image, -1) for images without labels"
        )


def decode(
    content: bytes | Image.Image, channels: int, max_value: float | None = None
) -> "Image.Image | Tensor":
    """Decode the first frame of an image, without EXIF rotation, or a .npy file.

    Args:
        content: bytes of the file, or a decoded image.
        channels: number of channels of the result.
        max_value: white of 16-bit images and of arrays that are not uint8 (see `data.max_value`).

    Returns:
        An 8-bit PIL image, or for an array a tensor [C H W]: uint8, or float32 divided by
        `max_value`.

    Raises:
        ValueError: the content is not an image, is too large, or has other channels.
    """
    if isinstance(content, Image.Image):
        return to_channels(content, channels, max_value)
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        array = np.load(io.BytesIO(content), allow_pickle=False)
        return _array_image(array, channels, max_value)
    with open_image(content) as image:
        return to_channels(image, channels, max_value)


@contextlib.contextmanager
def open_image(content: bytes) -> Iterator[Image.Image]:
    """Open an encoded image, whose pixels are decoded on first use.

    Raises:
        ValueError: the content is not an image, claims more than `MAX_PIXELS`, or is misread.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        # Pillow's own limit of 89 million pixels only warns. Pillow checks it again whenever a
        # region is cut out, and it is global, so it stays raised.
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:  # its message contains a memory address
        raise ValueError(
            "it is neither an image nor an array, or of a format, bit depth or number of bands "
            "that is not read: save those as .npy"
        ) from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS}")
        if image.format == "JPEG2000" and len(image.getbands()) > 1 and _jpeg2000_bits(content) > 8:
            # Pillow rounds their white up to 256, which becomes black.
            raise ValueError("Pillow misreads JPEG 2000 in colours of over 8 bits; save it as .npy")
        yield image


def _jpeg2000_bits(content: bytes) -> int:
    """Return the bits of the first channel (ISO/IEC 15444-1, section A.5.1)."""
    place = content.find(b"\xff\x4f\xff\x51") + 42
    return (int.from_bytes(content[place : place + 1]) & 127) + 1


def extensions_for(channels: int) -> tuple[str, ...]:
    """Return the extensions of files that can have this number of channels."""
    return EXTENSIONS if channels in PIL_MODES else ARRAYS


def _array_image(array: np.ndarray, channels: int, max_value: float | None) -> "Tensor":
    """[H W C] or [H W] -> tensor [C H W]: uint8, else float32 divided by `max_value`."""
    import torch  # imported here: datasets are listed before PyTorch is loaded

    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        hint = ""
        if array.ndim == 3 and array.shape[0] == channels:
            hint = "; it seems to be [C H W], save it as [H W C]"
        raise ValueError(
            f"an array of shape {array.shape} is not an image of {channels} channels{hint}"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"its numbers are {array.dtype}, not real")
    if array.dtype != np.uint8:
        array = _scale_array(array, 1 if max_value is None else max_value)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _scale_array(array: np.ndarray, max_value: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is reported below
        array = array.astype(np.float32)
        if max_value != 1:
            array = array / np.float32(max_value)
    # Reported here, where the file is known: a NaN in the loss does not name it.
    if not np.isfinite(array).all():
        raise ValueError("its numbers are not all finite in float32")
    return array
