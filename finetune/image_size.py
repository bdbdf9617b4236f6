"""Image sizes: a side in pixels or (height, width), and the size shown at each bandwidth."""

from typing import Any

from mae_et.errors import require

Size = int | tuple[int, int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Return height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_at_bandwidth(size: Size, bandwidth: int, patch: int) -> tuple[int, int]:
    """Return height and width at a bandwidth, which refers to the shorter side.

    The longer side is scaled by the same factor and rounded *up* to a multiple of the patch, so no
    frequency below the bandwidth is lost. The full bandwidth gives the size itself, whose sides are
    multiples of the patch, as are bandwidths.
    """
    height, width = height_and_width(size)
    unit = min(height, width) * patch
    return -(-height * bandwidth // unit) * patch, -(-width * bandwidth // unit) * patch


def format_size(size: Size) -> str:
    """Return a size as text: 224, or 96 x 128."""
    height, width = height_and_width(size)
    return str(height) if height == width else f"{height} x {width}"


def check_tiles(size: Size, patch: int, key: str) -> None:
    """Refuse an image size, given as `key`, whose sides are not multiples of the patch."""
    require(
        not any(side % patch for side in height_and_width(size)),
        f"{key} {format_size(size)} is not a multiple of the patch size {patch}",
    )


def patch_side(embed: Any) -> int:
    """Return the side of a patch of timm's embedding in image pixels, also for a hybrid's."""
    ratio = embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size
    return height_and_width(ratio)[0]
