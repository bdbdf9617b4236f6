"""Write points with thumbnails for TensorBoard's embedding projector."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mae_et.runtime.console import printable


def write_projector(
    folder: Path,
    vectors: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    thumbnails: Tensor,
) -> None:
    """Write a folder that TensorBoard opens as a cloud of points.

    Args:
        folder: log directory.
        vectors: [N D].
        columns: names of what is known of each point, two or more.
        rows: what is known of each point, N rows.
        thumbnails: [N C S S], uint8; other types are in [0, 1]. The first three channels, or the
            first, are shown.
    """
    shown = thumbnails[:, :3] if thumbnails.shape[1] >= 3 else thumbnails[:, :1]
    shown = shown.expand(-1, 3, -1, -1) / (1 if shown.is_floating_point() else 255)
    texts = [[printable(cell) for cell in row] for row in rows]
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            vectors.astype(np.float32), texts, shown, metadata_header=list(columns)
        )
