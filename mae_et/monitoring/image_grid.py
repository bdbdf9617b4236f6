"""Lay out panels of equal size as one image, with captions for columns and rows."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mae_et.io.atomic import write_atomically

FRAME = 4  # pixels around each panel
SMALLEST_FONT = 12
ROW_CAPTION = "#444444"


def image_grid(
    panels: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]] = (),
    frame: int = FRAME,
) -> Tensor:
    """Lay out panels [R C], all of one size, on white: uint8 [3 H W].

    Columns have captions; the lines of text beside each row start with a larger one. `frame` is in
    pixels around each panel.
    """
    width, height = panels[0][0].size
    size = max(SMALLEST_FONT, width // 8)
    head, small = ImageFont.load_default(size), ImageFont.load_default(max(12, size * 4 // 5))
    lengths = [small.getlength(line) for lines in rows for line in lines[1:]]
    lengths += [head.getlength(lines[0]) for lines in rows]
    left = round(max(lengths)) + 3 * frame if rows else 0
    top = size + 2 * frame
    canvas = Image.new(
        "RGB",
        (
            left + frame + len(columns) * (width + frame),
            top + frame + len(panels) * (height + frame),
        ),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for place, caption in enumerate(columns):
        centre = left + frame + place * (width + frame) + width // 2
        draw.text((centre, frame), caption, "black", head, anchor="ma")
    for number, row in enumerate(panels):
        y = top + frame + number * (height + frame)
        for place, panel in enumerate(row):
            canvas.paste(panel, (left + frame + place * (width + frame), y))
        for place, line in enumerate(rows[number] if rows else ()):
            font, colour, spacing = (small, ROW_CAPTION, 1.35) if place else (head, "black", 1.5)
            draw.text((2 * frame, y), line, colour, font)
            y += round(spacing * draw.textbbox((0, 0), "Bg", font)[3])
    return pil_to_tensor(canvas)


def as_panel(pixels: Tensor, side: int) -> Image.Image:
    """Draw pixels [3 h w] in [0, 1] as a panel, centred on white; `side` is the longer side.

    Small images keep their pixels as squares: they are repeated, then averaged to the size.
    """
    height, width = pixels.shape[-2:]
    scale = side / max(height, width)
    image = to_pil_image(pixels.clamp(0, 1).cpu())
    if scale > 1:
        times = math.ceil(scale)
        image = image.resize((width * times, height * times), Image.Resampling.NEAREST)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.BOX if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize(size, method)
    panel = Image.new("RGB", (side, side), "white")
    panel.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return panel


def save_png(path: Path, image: Tensor) -> None:
    """Write an image, uint8 [3 H W], as a PNG."""
    write_atomically(path, lambda temporary: to_pil_image(image).save(temporary, "PNG"))
