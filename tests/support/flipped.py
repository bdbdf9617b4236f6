"""Damage as a disk does it."""


def flipped(content: bytes, bit: int) -> bytes:
    """Return content with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
