"""From a file's bytes to an image with the channels that a run asks for."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et.config.files import one_sentence
from mae_et.data.layout import ARRAYS, EXTENSIONS
from mae_et.errors import RunFailed, Unreadable, UserError

Sample = tuple[Image.Image | Tensor, int]

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
MAX_PIXELS = 2**29
"""Of a picture, 1.6 GB in colours, twice that while it is converted: 20,000 x 20,000 is read, and
what claims more than this is not unpacked."""
Image.init()
# What a file may be taken for, whatever it is called. Of all that Pillow knows, EPS would start
# another program.
FORMATS = tuple(
    kind
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
    if kind in Image.OPEN  # a build may lack some
)


class Box(NamedTuple):
    """A part of a picture, in its pixels."""

    top: float
    left: float
    height: float
    width: float

    def scaled(self, rows: float, columns: float) -> "Box":
        """Return the box in a picture that is scaled by these factors."""
        return Box(self.top * rows, self.left * columns, self.height * rows, self.width * columns)


BoxSampler = Callable[[int, int], Box]
"""From a picture's height and width to a box in it."""


class DecodedDataset:
    """A source made of one that gives encoded or PIL images of any mode.

    Args:
        inner: map-style, `inner[i] -> (bytes or PIL image, label)`.
        classes: names of the labels.
        channels: of the images it gives.
        name: says which image a number means, for the message when it cannot be read.
    """

    def __init__(
        self, inner: Any, classes: Sequence[str], channels: int, name: Callable[[int], object]
    ):
        self.inner, self.classes, self.channels, self.name = inner, classes, channels, name

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # an IndexError outside, as of a list
        with self.naming_errors(index):
            content, label = self.inner[index]
            read = decode if isinstance(content, bytes) else to_channels
            return read(content, self.channels), int(label)

    def read_for_crop(self, index: int, draw: BoxSampler, size: int) -> tuple[Any, int, BoxSampler]:
        """Return what a crop is best read from.

        Args:
            index: the image.
            draw: a box in it, given its height and width.
            size: side of the crop in pixels.

        Returns:
            Encoded bytes or a PIL image, its label, and the draw of the same box in it.
        """
        content, label = self.inner[index]
        return content, int(label), draw

    @contextlib.contextmanager
    def naming_errors(self, index: int) -> Iterator[None]:
        """Name the image in the sentence, should it be unreadable.

        Raises:
            Unreadable: it is.
        """
        try:
            yield
        except (UserError, RunFailed):
            raise
        except Exception as error:  # decoders of damaged files raise whatever they stumble on
            said = f"cannot read the image {self.name(index)}: {one_sentence(error)}"
            # A name may hold what a terminal obeys, and ends of lines.
            printable = "".join(each if each.isprintable() else "?" for each in said)
            raise Unreadable(printable) from None


def decode(content: bytes, channels: int) -> Image.Image | Tensor:
    """Decode a picture or a .npy file: the first frame, as it is stored (no EXIF rotation)."""
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        return _array_image(np.load(io.BytesIO(content), allow_pickle=False), channels)
    with open_image(content) as image:
        return to_channels(image, channels)


@contextlib.contextmanager
def open_image(content: bytes) -> Iterator[Image.Image]:
    """Open an encoded picture, which is decoded when its pixels are asked for.

    Raises:
        ValueError: it is none, or claims more than `MAX_PIXELS`.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        # Pillow's own limit, of 89 million pixels, warns; ours is told in a sentence. It stays, for
        # Pillow looks again whenever a part is cut out, and belongs to the process, not a thread.
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:  # its message is about the bytes' place in memory
        raise ValueError("it is neither a picture nor an array") from None
    with image:
        check_pixels(*image.size)
        yield image


def check_pixels(width: int, height: int) -> None:
    """Refuse a picture that is too large to be decoded.

    Raises:
        ValueError: it has more than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS}")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a PIL image to the mode that has this many channels, of 8 bits.

    Raises:
        UserError: PIL has no such mode.
    """
    check_channels(channels)
    if image.mode in SIXTEEN_BIT_MODES:
        image = _high_byte(image)
    elif image.mode == "F":
        raise ValueError("the range of its floating-point numbers is unknown; save it as .npy")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as at once, without PIL's warning
    return image.convert(PIL_MODES[channels])


def check_channels(channels: int) -> None:
    """Refuse channels that no picture has.

    Raises:
        UserError: PIL has no mode of so many channels.
    """
    if channels not in PIL_MODES:
        raise UserError(
            f"model.channels {channels} needs arrays (.npy, [H W C]); pictures have "
            f"{', '.join(map(str, PIL_MODES))}"
        )


def _high_byte(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, as PIL does 16-bit colour; of grey it would clip all at 255."""
    array = np.asarray(image)
    if array.min() < 0 or array.max() > 0xFFFF:
        raise ValueError("its numbers exceed 16 bits; save it as .npy")
    return Image.fromarray((array >> 8).astype(np.uint8))


def _array_image(array: np.ndarray, channels: int) -> Tensor:
    """[H W C] or [H W] -> tensor [C H W]: uint8 as it is, other types as float32, not scaled."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"an array of shape {array.shape} is no image of {channels} channels")
    if array.dtype != np.uint8:
        with np.errstate(over="ignore", invalid="ignore"):  # the next lines tell of it
            array = array.astype(np.float32)
        # Here a file can still be named; of a loss that is NaN nobody knows where it came from.
        if not np.isfinite(array).all():
            raise ValueError("its numbers are not all finite in float32")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def extensions_for(channels: int) -> tuple[str, ...]:
    """Return the endings of files that can hold images of so many channels."""
    return EXTENSIONS if channels in PIL_MODES else ARRAYS
