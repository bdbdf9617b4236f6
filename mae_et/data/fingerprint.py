"""Identify a dataset by the names and labels of its images, and the contents of some."""

import hashlib
from typing import Any

from mae_et.data.datasets import ImageDataset
from mae_et.data.evenly_spaced import evenly_spaced

SAMPLES = 16


def fingerprint(source: ImageDataset) -> str:
    """Return a SHA-256 of the number, names and labels of a dataset's images, in order.

    Names are relative to the root, so that data may move. Contents are not read, but prepared
    shards contribute their checksums.
    """
    digest = hashlib.sha256(repr((len(source), list(source.classes))).encode())
    identity = getattr(getattr(source, "inner", None), "identity", None)
    for part in identity() if identity else ():  # without it, images have no names
        digest.update(part)
    return digest.hexdigest()


def fingerprint_with_contents(source: ImageDataset) -> str:
    """Return a SHA-256 of `fingerprint` and of at most 16 images, evenly spaced, with their labels.

    It distinguishes datasets with the same names, such as the severities of ImageNet-C, and
    datasets whose images have no names. Images that cannot be read do not count.
    """
    digest = hashlib.sha256(fingerprint(source).encode())
    inner: Any = getattr(source, "inner", source)
    for index in evenly_spaced(len(source), SAMPLES):
        try:
            content, label = inner[index]
        except Exception:  # each library has its own
            continue
        digest.update(content if isinstance(content, bytes) else content.tobytes())
        digest.update(repr(int(label)).encode())
    return digest.hexdigest()
