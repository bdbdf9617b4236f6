"""Reconstructions of a run, embedded in the page."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image

from mae_et.monitoring.report.records import Record

IMAGES = 3
WIDTH = 920  # pixels: four panels of 224 and their frames


def embedded_images(record: Record) -> list[tuple[str, str]]:
    """Return captions and data URIs of a few images, from the first to the last."""
    steps = {}
    for path in (record.folder / "reconstructions").glob("step-*.png"):
        digits = path.stem.removeprefix("step-")
        # A resumed run may have images of steps that it has not reached again.
        if digits.isdecimal() and int(digits) <= record.step:
            steps[int(digits)] = path
    ordered = sorted(steps)
    count = min(IMAGES, len(ordered))
    places = [round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)]
    if count == 1:
        places = [len(ordered) - 1]
    found = []
    for step in (ordered[place] for place in places):
        content, epochs = _embedded(steps[step]), record.epochs(step)
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
