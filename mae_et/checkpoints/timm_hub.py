"""Fetch timm models from their hub: nothing is executed, and checksums are verified.

timm reads weights as plain tensors (`weights_only`) by default; here it cannot do otherwise. The
names of files at plain URLs contain the first digits of their SHA-256, which torch verifies on
request. The Hugging Face hub's cache names large files by their SHA-256.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from timm.models import _builder

from mae_et.errors import UserError, one_line

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def create_pretrained(name: str, **arguments: Any) -> Any:
    """Create a timm model with its published weights.

    Raises:
        ValueError: a file's checksum differs from the published one.
        Exception: whatever timm and the hub's client raise.
    """
    with _strictly():
        model: Any = timm.create_model(name, pretrained=True, **arguments)
    about = getattr(model, "pretrained_cfg", None) or {}
    if about.get("hf_hub_id"):
        check_cache(about["hf_hub_id"])
    return model


def fetch_from_hub(name: str, **arguments: Any) -> Any:
    """Create a timm model with its published weights; see `create_pretrained`.

    Raises:
        UserError: the hub cannot be reached, or a file is not the published one.
    """
    try:
        return create_pretrained(name, **arguments)
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"timm cannot fetch {name} from its hub: {one_line(error)}") from None


def check_cache(repository: str) -> int:
    """Verify the published SHA-256 of a repository's files in the hub's cache.

    Large files are stored under their SHA-256 (the hub's entity tag); small ones, under git's hash,
    are only read as JSON.

    Returns:
        The number of files verified.

    Raises:
        ValueError: a file differs and should be deleted.
    """
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return 0
    folder = Path(HF_HUB_CACHE) / f"models--{repository.partition('@')[0].replace('/', '--')}"
    compared = 0
    for blob in sorted(folder.glob("blobs/*")):
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            with blob.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                    raise ValueError(f"{blob} is not what was published (SHA-256): delete it")
            compared += 1
    return compared


@contextlib.contextmanager
def _strictly() -> Iterator[None]:
    """Make torch refuse pickled objects and verify checksums, whatever timm requests."""
    kept, checked = os.environ.get(FORCE), _builder._CHECK_HASH
    os.environ[FORCE] = "1"
    _builder.set_pretrained_check_hash(True)
    try:
        yield
    finally:
        _builder.set_pretrained_check_hash(checked)
        if kept is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = kept
