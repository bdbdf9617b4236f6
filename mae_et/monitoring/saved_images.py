"""Reconstructions in a run folder: `reconstructions/step-00001234.png`."""

from pathlib import Path

FOLDER = "reconstructions"


def image_path(run: Path, step: int) -> Path:
    """Return the path of the image of a step."""
    return run / FOLDER / f"step-{step:08d}.png"


def saved_images(run: Path, last: int) -> dict[int, Path]:
    """Return the images by step, up to step `last`: a resumed run may have later ones."""
    paths = {path.stem.removeprefix("step-"): path for path in (run / FOLDER).glob("step-*.png")}
    steps = {int(digits): path for digits, path in paths.items() if digits.isdecimal()}
    return {step: steps[step] for step in sorted(steps) if step <= last}
