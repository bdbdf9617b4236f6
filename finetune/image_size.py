"""Image sizes: a side in pixels or (height, width), and the size shown at each bandwidth."""

Size = int | tuple[int, int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Return height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def shorter_side(size: Size) -> int:
    """Return the shorter side in pixels, which bandwidths refer to."""
    return min(height_and_width(size))


def size_at_bandwidth(size: Size, bandwidth: int, patch: int) -> tuple[int, int]:
    """Return height and width at a bandwidth of the shorter side.

    The longer side is scaled by the same factor and rounded *up* to a multiple of the patch, so no
    frequency below the bandwidth is lost. The full bandwidth gives the size itself.

    Args:
        size: base size, whose sides are multiples of the patch.
        bandwidth: multiple of the patch, at most the shorter side.
        patch: side of a patch, in pixels.
    """
    height, width = (
        -(-side * bandwidth // (shorter_side(size) * patch)) * patch
        for side in height_and_width(size)
    )
    return height, width


def format_size(size: Size) -> str:
    """Return a size as text: 224, or 96 x 128."""
    height, width = height_and_width(size)
    return str(height) if height == width else f"{height} x {width}"
