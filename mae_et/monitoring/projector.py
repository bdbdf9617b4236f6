"""Write points with thumbnails for TensorBoard's embedding projector."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mae_et.monitoring.reconstructions import as_rgb
from mae_et.runtime.console import printable


def write_projector(
    folder: Path, vectors: np.ndarray, rows: Sequence[tuple[str, str]], thumbnails: Tensor
) -> None:
    """Write a folder that TensorBoard opens as a cloud of points.

    Each of N points has a vector [N D], a name and a class, and a thumbnail [N C S S], uint8 or of
    another type in [0, 1].
    """
    shown = as_rgb(thumbnails) / (1 if thumbnails.is_floating_point() else 255)
    texts = [[printable(cell) for cell in row] for row in rows]
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            vectors.astype(np.float32), texts, shown, metadata_header=["name", "class"]
        )
