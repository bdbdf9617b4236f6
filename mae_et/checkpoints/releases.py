"""Recognise MAE's released files by their md5 (facebookresearch/mae, README and FINETUNE.md)."""

import hashlib
import warnings
from pathlib import Path

from mae_et.runtime.console import say

# First digits of each file's md5, as published.
RELEASED_MD5 = {
    "8cad7c": "mae_pretrain_vit_base.pth",
    "b8b06e": "mae_pretrain_vit_large.pth",
    "9bdbb0": "mae_pretrain_vit_huge.pth",
    "1b25e9": "mae_finetuned_vit_base.pth",
    "51f550": "mae_finetuned_vit_large.pth",
    "2541f2": "mae_finetuned_vit_huge.pth",
}


def report_release(path: Path) -> None:
    """Report a released file on stderr; warn of a file that only bears a released file's name."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    name = RELEASED_MD5.get(digest[:6])
    if name is not None:
        say(f"{path} is {name} as released (md5)")
    elif path.name in RELEASED_MD5.values():
        warnings.warn(
            f"{path} is not the released file of that name: its md5 differs", stacklevel=2
        )
