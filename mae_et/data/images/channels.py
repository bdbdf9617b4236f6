"""Convert PIL images of any mode to 8-bit images with a given number of channels."""

import numpy as np
from PIL import Image, ImageOps

from mae_et.errors import UserError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
SIXTEEN_BITS = 0xFFFF
# Tags of TIFF files, with the value that matters here.
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
SAMPLE_FORMAT, SIGNED = 339, 2
PLANES, SEPARATE = 284, 2
COMPRESSION, NONE = 259, 1
BITS, EXTRA_BANDS, UNSPECIFIED = 258, 338, 0


def to_channels(image: Image.Image, channels: int, max_value: float | None = None) -> Image.Image:
    """Convert a PIL image of any mode to the 8-bit mode with 1, 3 or 4 channels.

    `max_value` is the white of a 16-bit image; 65535 if None.

    Raises:
        UserError: PIL has no mode with this number of channels.
        ValueError: the image has floating-point numbers, numbers of more than 16 bits, or bands
            that Pillow misreads.
    """
    check_channels(channels)
    if channels == 4 and unread_bands(image):
        raise ValueError("its fourth band is not marked as transparency; save it as .npy")
    raw_planes = _tiff_tag(image, PLANES) == SEPARATE and _tiff_tag(image, COMPRESSION) == NONE
    if raw_planes and (_tiff_tag(image, BITS) or 0) > 8:
        raise ValueError("Pillow misreads uncompressed 16-bit TIFF in planes; save it as .npy")
    if image.mode in SIXTEEN_BIT_MODES:
        # Pillow has already scaled PGM files, by the maximum in their header.
        known = max_value is None or getattr(image, "format", None) == "PPM"
        inverted = _tiff_tag(image, PHOTOMETRIC) == WHITE_IS_ZERO  # PIL inverts 8 bits only
        image = _to_eight_bits(image, SIXTEEN_BITS if known else int(max_value or 0))
        image = ImageOps.invert(image) if inverted else image
    elif image.mode == "L" and _tiff_tag(image, SAMPLE_FORMAT) == SIGNED:
        raise ValueError("its 8-bit numbers are signed; save it as .npy")
    elif image.mode == "F":
        raise ValueError("the range of its floating-point numbers is unknown; save it as .npy")
    elif max_value not in {None, SIXTEEN_BITS} and has_deep_colours(image):
        raise ValueError(
            "its 16-bit colours decode to their high byte, without data.max_value; save it as .npy"
        )
    elif image.mode == "LAB":
        image = image.convert("RGB")  # PIL supports no other conversion
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours as direct conversion, without PIL's warning
    return image.convert(PIL_MODES[channels])


def unread_bands(image: Image.Image) -> int:
    """Return the number of bands of a TIFF file that are neither colours nor transparency."""
    return list(getattr(image, "tag_v2", {}).get(EXTRA_BANDS, ())).count(UNSPECIFIED)


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    """Return the first value of a TIFF tag; None if the image does not have it."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def check_channels(channels: int) -> None:
    """Raise a UserError for a number of channels that image files cannot have."""
    if channels not in PIL_MODES:
        raise UserError(
            f"model.channels {channels} needs arrays (.npy, [H W C]); images have "
            f"{', '.join(map(str, PIL_MODES))}"
        )


def has_deep_colours(image: Image.Image) -> bool:
    """Return whether an undecoded image has 16-bit colours; PIL keeps only their high bytes."""
    return image.mode in {"RGB", "RGBA", "LA", "CMYK"} and any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )


def _to_eight_bits(image: Image.Image, max_value: int) -> Image.Image:
    """Scale 16-bit grey so that 0 to `max_value` become 0 to 255; PIL would clip it at 255."""
    array = np.asarray(image)
    low, high = array.min(), array.max()
    if low < 0 or high > SIXTEEN_BITS:
        raise ValueError(f"its numbers {low} to {high} exceed 0 to {SIXTEEN_BITS}; save it as .npy")
    # For 65535 this is the high byte, as PIL keeps for 16-bit colours; for 4095 the high 8 bits.
    scaled = np.minimum(array.astype(np.uint32) * 256 // (max_value + 1), 255)
    return Image.fromarray(scaled.astype(np.uint8))
