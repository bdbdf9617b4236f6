"""Embed the reconstructions of a run in the page."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image

from mae_et.monitoring.figures import spread
from mae_et.monitoring.report.records import ReportedRun

IMAGES = 3
WIDTH = 920  # pixels: four panels of 224 and their frames


def embedded_images(record: ReportedRun) -> list[tuple[str, str]]:
    """Return captions and data URIs of a few images, from the first to the last."""
    saved = record.reconstructions(record.step)
    found = []
    for step in spread(list(saved), IMAGES):
        content, epochs = _embedded(saved[step]), record.epochs(step)
        if content is not None:
            after = "" if epochs is None else f" · {epochs:.3g} epochs"
            found.append((f"step {step:,}{after}", content))
    return found


def _embedded(path: Path) -> str | None:
    """Re-encode an image, which validates it, as a data URI; None if it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                image.thumbnail((WIDTH, 4 * WIDTH))
                content = io.BytesIO()
                image.convert("RGB").save(content, "WEBP", quality=88)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning,
            Image.DecompressionBombError):  # fmt: skip
        return None
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
