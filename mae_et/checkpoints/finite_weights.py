"""Refuse weights that are not finite."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mae_et.errors import UserError


def check_finite(path: Path, tensors: Mapping[str, Tensor], read: Iterable[str]) -> None:
    """Refuse tensors with infinities or NaN, among those whose names are `read`.

    Others may have them on purpose, as the mask of CLIP's text tower.
    """
    for name in read:
        if name in tensors and not tensors[name].isfinite().all():
            raise UserError(f"{path} holds weights that are not finite numbers ({name})")
