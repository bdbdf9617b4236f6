"""Preprocessing of an encoder's images: stored with its weights, inherited downstream."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mae_et.config.data import DataConfig
from mae_et.errors import UserError
from mae_et.runtime.console import is_main, say

# Fixed for all evaluation views of mae-et.
INTERPOLATION, CROP_MODE = "bicubic", "center"
# Pillow's and Hugging Face's numbers of the filters.
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@contextmanager
def _refuse_damage(
    path: object, damage: str = "its statistics or sizes are not numbers"
) -> Iterator[None]:
    """Raise a `UserError` for the errors that entries of wrong types and values raise."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: {damage}") from None


@dataclass(frozen=True)
class Preprocessing:
    """Statistics, evaluation view and base size of the images that an encoder was trained on."""

    mean: tuple[float, ...]
    """Mean of each channel, of images in [0, 1]; one number serves all channels."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    eval_crop: float = 0.875
    """Share of the resized side that the centre crop keeps in evaluation."""
    image_size: int | tuple[int, int] | None = None
    """Base size in pixels, or (height, width); None if it is not recorded."""
    interpolation: str = INTERPOLATION
    """Interpolation of the resizing."""
    crop_mode: str = CROP_MODE
    """How images of other aspect ratios are fitted to this size (timm's names)."""

    @classmethod
    def of_run(cls, data: DataConfig, image_size: int | tuple[int, int]) -> "Preprocessing":
        """Return the preprocessing of a run's config."""
        return cls(data.mean, data.std, data.eval_crop, image_size)

    @classmethod
    def of_timm(cls, config: Any, path: object = "timm") -> "Preprocessing | None":
        """Return the preprocessing in timm's `pretrained_cfg`; None without statistics."""
        with _refuse_damage(path):
            if not config or not config.get("mean"):
                return None
            height, width = config.get("input_size", (3, 224, 224))[-2:]
            return cls._checked(
                config["mean"], config["std"], config.get("crop_pct") or 0.875, (height, width),
                config.get("interpolation") or INTERPOLATION, config.get("crop_mode") or CROP_MODE,
            )  # fmt: skip

    @classmethod
    def of_timm_model(cls, name: str) -> "Preprocessing | None":
        """Return the preprocessing of a model's weights in timm; None without statistics.

        Names with a scheme (`hf-hub:`, `local-dir:`) are those of a hub's or a folder's config.
        """
        import timm  # here: run folders are read before PyTorch is loaded
        import torch

        if ":" not in name:
            published = timm.get_pretrained_cfg(name)
            return cls.of_timm(published.to_dict()) if published else None
        try:  # of a hub or a folder
            with torch.device("meta"):
                return cls.of_timm(timm.create_model(name).pretrained_cfg, name)
        except Exception:  # building the network reports it
            return None

    @classmethod
    def of_hugging_face(cls, about: dict[str, Any], path: object) -> "Preprocessing | None":
        """Return the preprocessing in a `preprocessor_config.json`; None without statistics."""
        with _refuse_damage(path):
            statistics = _statistics(about)
            if statistics is None:
                return None
            resized, crop = _sides(about.get("size")), _sides(about.get("crop_size"))
            share, mode = float(about.get("crop_pct") or 1), _crop_mode(about)  # ConvNeXt's
            if about.get("do_center_crop") and resized and crop:
                share = min(crop) / min(resized)
            else:
                crop = resized
            name = _RESAMPLING.get(about.get("resample", 3), INTERPOLATION)
            return cls._checked(*statistics, share, crop, name, mode)

    @classmethod
    def from_dict(cls, entries: Any, path: object) -> "Preprocessing":
        """Build a preprocessing from its fields in decoded JSON."""
        with _refuse_damage(path, "mae_et.preprocessing has other entries"):
            return cls._checked(**entries)

    @classmethod
    def from_json(cls, text: Any, path: object) -> "Preprocessing":
        """Parse the JSON text that our files record; see `from_dict`."""
        with _refuse_damage(path, "mae_et.preprocessing is not JSON"):
            entries = json.loads(text)
        return cls.from_dict(entries, path)

    @classmethod
    def _checked(
        cls, mean: Any, std: Any, eval_crop: Any, image_size: Any, interpolation: Any,
        crop_mode: Any = CROP_MODE,
    ) -> "Preprocessing":  # fmt: skip
        """Convert and check a file's entries; wrong ones raise ValueError or TypeError."""
        statistics = tuple(map(float, mean)), tuple(map(float, std))
        if image_size is not None and not isinstance(image_size, int):
            height, width = map(int, image_size)
            image_size = height if height == width else (height, width)
        try:
            DataConfig(mean=statistics[0], std=statistics[1], eval_crop=float(eval_crop))
        except UserError as error:
            raise ValueError(str(error)) from None
        return cls(*statistics, float(eval_crop), image_size, str(interpolation), str(crop_mode))

    def data_settings(self) -> dict[str, Any]:
        """Return the `data` keys that it determines."""
        return {"mean": self.mean, "std": self.std, "eval_crop": self.eval_crop}

    def differences(self, data: DataConfig) -> list[str]:
        """Describe each difference of a data config in a phrase."""
        differing = [
            f"data.{key} {list(now) if isinstance(now, tuple) else now} (the checkpoint has "
            f"{list(own) if isinstance(own, tuple) else own})"
            for key, own in self.data_settings().items()
            if not _equal(now := getattr(data, key), own)
        ]
        if self.interpolation != INTERPOLATION:
            differing.append(
                f"{INTERPOLATION} interpolation (the checkpoint has {self.interpolation})"
            )
        if self.crop_mode != CROP_MODE:
            differing.append(f"a central crop (the checkpoint has crop mode {self.crop_mode})")
        return differing


def report_preprocessing(recorded: Preprocessing | None, data: DataConfig, path: object) -> None:
    """Report in one line, from rank 0, how images are prepared otherwise than in the training."""
    if not is_main():
        return
    if recorded is None:
        say(
            f"{path} records no statistics of its images, which are normalised with "
            f"data.mean {list(data.mean)} and data.std {list(data.std)}"
        )
    elif differing := recorded.differences(data):
        say(f"images are prepared with {', '.join(differing)}")


def _statistics(about: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Return mean and std, of values in [0, 1], in Hugging Face's notation; None without them.

    Hugging Face's apply to values in [0, 255], times `rescale_factor` if `do_rescale`.
    """
    white = 255 * float(about.get("rescale_factor", 1 / 255)) if about.get("do_rescale", 1) else 255
    if about.get("do_normalize") is False:
        return [0.0], [1 / white]
    if not about.get("image_mean"):
        return None
    mean, std = about["image_mean"], about["image_std"]
    return [float(value) / white for value in mean], [float(value) / white for value in std]


def _crop_mode(about: dict[str, Any]) -> str:
    """Return how Hugging Face's processor changes an image's aspect ratio, in timm's terms.

    A plain number in an old config is a square's side in ViT's processors, else the shorter side.
    """
    if about.get("do_resize") is False:
        return "no resizing"
    size = about.get("size")
    kind = about.get("image_processor_type") or about.get("feature_extractor_type") or "ViT"
    square = isinstance(size, int) and str(kind).startswith(("ViT", "DeiT", "Beit"))
    return "squash" if square or (isinstance(size, dict) and "height" in size) else CROP_MODE


def _sides(size: Any) -> tuple[int, int] | None:
    """Return height and width of a size in Hugging Face's notation."""
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])


def _equal(now: Any, own: Any) -> bool:
    """Compare numbers, or statistics; one number stands for all channels."""
    if not isinstance(now, tuple):
        return abs(now - own) < 1e-3
    length = max(len(now), len(own))
    now, own = (values * length if len(values) == 1 else values for values in (now, own))
    return len(now) == len(own) and all(abs(a - b) < 1e-4 for a, b in zip(now, own, strict=True))
