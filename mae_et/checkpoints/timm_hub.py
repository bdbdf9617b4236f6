"""Models of timm's hub: fetched without running code, and compared with what was published.

timm reads weights as plain tensors (`weights_only`) already; here it may not do otherwise. Of files
at a plain address the published name holds the first digits of the SHA-256, which torch compares
when it is asked to. Of those on the Hugging Face hub the cache is named after it.
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

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def create_pretrained(name: str, **arguments: Any) -> Any:
    """Create a timm model with its published weights.

    Raises:
        ValueError: a file of the weights has another checksum than was published.
        Exception: whatever timm and the hub's client raise.
    """
    with _strictly():
        model: Any = timm.create_model(name, pretrained=True, **arguments)
    about = getattr(model, "pretrained_cfg", None) or {}
    if about.get("hf_hub_id"):
        check_cache(about["hf_hub_id"])
    return model


def check_cache(repository: str) -> int:
    """Compare the files of a repository in the hub's cache with their published SHA-256.

    Large files lie there under their SHA-256 (the hub's entity tag of them); the small ones, under
    that of git, are read as JSON alone.

    Returns:
        How many were compared.

    Raises:
        ValueError: one differs; it should be deleted.
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
    """Have torch refuse pickled objects, and compare checksums, whatever timm asks it for."""
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
