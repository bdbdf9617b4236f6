"""Draw images as training presents them to the encoder: original, box, crop, patches, mask.

Shapes: C channels, H W of the original, S bandwidth, N = (S / patch)^2 patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from einops import repeat
from PIL import Image, ImageDraw
from torch import Tensor

from mae_et.config.data import DataConfig
from mae_et.curriculum.plan import PlannedStage
from mae_et.monitoring.image_grid import as_panel, image_grid
from mae_et.monitoring.reconstructions import GREY, as_rgb, displayable

COLUMNS = ("original", "random box", "crop at B", "patches", "visible patches")
PANEL = 176
"""Side of a panel, in pixels."""
ACCENT = "#ff7f0e"
GRID_LINE = "#ffffff"


@dataclass(frozen=True)
class TrainingView:
    """One sample, as training presents it to the encoder."""

    stage: PlannedStage
    original: Tensor
    """[C H W]: uint8, or in [0, 1]."""
    box: tuple[float, float, float, float]
    """Top, left, height and width of the crop, in pixels of the original."""
    flipped: bool
    images: Tensor
    """float32 [1 C S S]: the normalised crop at the stage's bandwidth, as encoded."""
    hidden: Tensor
    """float32 [N]: 1 for masked patches."""


def preview_image(views: Sequence[TrainingView], data: DataConfig, patch: int) -> Tensor:
    """Draw views as captioned rows, uint8 [3 H W], with patches of `patch` pixels."""
    rows = [_panels(view, data, patch) for view in views]
    captions = [_captions(view, data, patch) for view in views]
    return image_grid(rows, COLUMNS, captions, frame=8)


def _panels(view: TrainingView, data: DataConfig, patch: int) -> list[Image.Image]:
    crop = displayable(view.images, data)[0]
    side = crop.shape[-1] // patch
    hidden = repeat(view.hidden, "(h w) -> 1 (h p) (w q)", h=side, p=patch, q=patch)
    shown = as_panel(crop, PANEL)
    masked = as_panel(crop * (1 - hidden) + GREY * hidden, PANEL)
    original = view.original
    scale = 1.0 if original.is_floating_point() else 255.0
    whole = as_panel(as_rgb(original[None] / scale)[0], PANEL)
    boxed = _with_box(whole, view)
    return [whole, boxed, shown, _with_grid(shown, side), _with_grid(masked, side)]


def _with_box(whole: Image.Image, view: TrainingView) -> Image.Image:
    """Draw the box on the panel of the original, and fade the area outside it."""
    height, width = view.original.shape[-2:]
    scale = PANEL / max(height, width)
    left, top = (PANEL - width * scale) / 2, (PANEL - height * scale) / 2
    first = round(left + view.box[1] * scale), round(top + view.box[0] * scale)
    last = (
        round(left + (view.box[1] + view.box[3]) * scale) - 1,
        round(top + (view.box[0] + view.box[2]) * scale) - 1,
    )
    faded = Image.blend(whole, Image.new("RGB", whole.size, "white"), 0.6)
    area = (*first, last[0] + 1, last[1] + 1)
    faded.paste(whole.crop(area), area)
    ImageDraw.Draw(faded).rectangle((*first, *last), outline=ACCENT, width=2)
    return faded


def _with_grid(panel: Image.Image, side: int) -> Image.Image:
    """Draw the grid lines of `side` x `side` patches."""
    lined = panel.copy()
    draw = ImageDraw.Draw(lined)
    for line in range(1, side):
        place = round(line * PANEL / side)
        draw.line((place, 0, place, PANEL), GRID_LINE)
        draw.line((0, place, PANEL, place), GRID_LINE)
    return lined


def _captions(view: TrainingView, data: DataConfig, patch: int) -> list[str]:
    side, stage = view.images.shape[-1] // patch, view.stage
    lines = [
        f"B = {stage.bandwidth}",
        f"{side} x {side} patches",
        f"{int((1 - view.hidden).sum())} visible",
        f"stage {stage.index + 1}",
        f"step {stage.start:,}",
    ]
    if data.augment is not None:
        lines.append(f"magnitude {stage.magnitude:g}")
    return [*lines, "mirrored"] if view.flipped else lines
