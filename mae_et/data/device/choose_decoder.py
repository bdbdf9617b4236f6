"""Choose who makes the views of images: the GPU (and by which library) or loader processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_et.config.efficiency import DecodePlace
from mae_et.data.cached_dataset import CachedDataset
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.decoder_trial import try_decoder
from mae_et.data.device.self_checks import Decode, checked_decode, encode_jpeg, fastest_resize
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import UserError, one_line
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext, any_rank

MEMORY = "memory"
"""Name of the library, where images in memory need no decoder."""
BESIDE_TRAINING = 0.4
"""Part of its speed that nvJPEG keeps beside training, which a trial does without: 0.44 and 0.38 at
96 and 160 pixels on an H200 (docs/scaling.md)."""


def choose_decoder(
    requested: DecodePlace,
    dataset: Any,
    world: DistributedContext,
    num_workers: int = 0,
    before: str | None = None,
    cpu_sides: tuple[int, ...] = (),
) -> DeviceDecoder | None:
    """Choose the decoder of a run (None: loader processes decode), and print which and why.

    On a GPU, `auto` tries both ways (`decoder_trial`) at each image side, and chooses the GPU if
    its views are right and it is faster on every rank. Pixels differ by rounding, so a resumed run
    keeps its device and library, even if another is faster: `before` is `cpu` or a library (`gpu`:
    either library), or None for a new run, and `cpu_sides` are the sides at which the CPU has
    decoded instead. Every rank must call this.
    """
    decoder, reasons = None, []
    # Without a choice, `auto` prints nothing. Ranks differ where only some have images in memory.
    source = dataset.source if isinstance(dataset, TrainDataset) else None
    in_memory = isinstance(source, CachedDataset)
    chooses = isinstance(source, DecodedDataset | CachedDataset) and world.device.type == "cuda"
    if requested == "gpu" or (requested == "auto" and any_rank(chooses, world)):
        with fail_together(world):
            decoder, reason = _choose(
                requested, dataset, world.device, num_workers, before, cpu_sides
            )
        agreed = _agreed(decoder, dataset.sides, world)
        if decoder is not None and agreed != decoder.cpu_sides:
            reason = "on another rank, the GPU cannot decode or is slower"
            decoder.cpu_sides = agreed
            decoder = None if set(agreed) == set(dataset.sides) else decoder
        reasons.append(reason)
    place, library, exceptions = "CPU", "cpu", tuple[int, ...]()
    if decoder is not None:
        place, library, exceptions = "GPU", decoder.library, decoder.cpu_sides
    same = before in (place.lower(), library) and exceptions == cpu_sides
    if before is not None and not same:
        so_far = {"cpu": "the CPU", "gpu": "the GPU", MEMORY: "the GPU from memory"}
        reasons.append(
            f"before by {so_far.get(before, before)}{_but(cpu_sides)}: pixels differ by rounding"
        )
    if reasons:
        notify(
            f"images are {'cropped' if in_memory else 'decoded'} by the {place}{_but(exceptions)} "
            f"(efficiency.decode {requested}): {'; '.join(reasons)}"
        )
    return decoder


def _agreed(
    decoder: DeviceDecoder | None, sides: Sequence[int], world: DistributedContext
) -> tuple[int, ...]:
    """Return the sides at which the CPU decodes on any rank."""
    mine = sides if decoder is None else decoder.cpu_sides
    return tuple(side for side in sorted(set(sides)) if any_rank(side in mine, world))


def _but(cpu_sides: tuple[int, ...]) -> str:
    return f", at {', '.join(map(str, cpu_sides))} px by the CPU" if cpu_sides else ""


def _choose(
    requested: DecodePlace,
    dataset: Any,
    device: torch.device,
    num_workers: int,
    before: str | None,
    cpu_sides: tuple[int, ...],
) -> tuple[DeviceDecoder | None, str]:
    """Return this rank's decoder, if any, and the reason for it or against it."""
    unsuited = _unsuited(dataset, device)
    if unsuited is None and requested == "auto" and before == "cpu":
        return None, "as when the run started; gpu would change it"
    decoder, name, notes = (None, unsuited, "") if unsuited else _build(dataset, device, before)
    if decoder is None:
        if requested == "gpu":
            raise UserError(f"efficiency.decode gpu is not possible: {name}")
        return None, name
    if requested == "gpu":
        return decoder, name + notes
    last_stages = {side: stage for stage, side in enumerate(dataset.sides)}
    if before is not None:  # only check that it is still right
        last_stages = {dataset.sides[-1]: len(dataset.sides) - 1}
    trials = {s: try_decoder(decoder, dataset, num_workers, n) for s, n in last_stages.items()}
    fault = next((trial.fault for trial in trials.values() if trial.fault), None)
    part = 1 if decoder.library == MEMORY else BESIDE_TRAINING
    speeds = "; ".join(
        f"{t.device:,.0f} images/s at {side} px"
        + ("" if part == 1 else f" (about {t.device * part:,.0f} beside training)")
        + f", {num_workers} loader processes {t.cpu:,.0f}"
        for side, t in trials.items()
    )
    speeds += "" if part == 1 else " (files read before: storage may be slower)"
    if before is None:
        cpu_sides = tuple(sorted(side for side, t in trials.items() if t.device * part <= t.cpu))
    if fault is None and not set(dataset.sides) <= set(cpu_sides):
        decoder.cpu_sides = cpu_sides
        return decoder, f"{name} {speeds}{notes}"
    torch.cuda.empty_cache()  # of the decoder's streams
    return None, fault or f"the GPU with {name} {speeds}{notes}"


def _build(
    dataset: TrainDataset, device: torch.device, preferred: str | None
) -> tuple[DeviceDecoder | None, str, str]:
    """Return a decoder, its name and notes on it; without one, why."""
    decode: Decode | CachedDataset | None
    if isinstance(dataset.source, CachedDataset):
        decode, name = dataset.source, MEMORY
        fault = decode.buffer.pin(device)
        note = f"slower, since its memory cannot be pinned: {fault}" if fault else ""
    else:
        decode, name = _find_decoder(device, preferred)
        if decode is None:
            return None, name, ""
        decode, note = checked_decode(decode, device)
    resize, resizing = fastest_resize(device)
    notes = "".join(f"; {each}" for each in (note, resizing) if each)
    library = name.partition(" ")[0]  # without the reasons against other libraries
    return DeviceDecoder(device, dataset.sides, decode, resize, library), name, notes


def _unsuited(dataset: Any, device: torch.device) -> str | None:
    """Return why a run cannot decode on the GPU; None if it can."""
    if device.type != "cuda":
        if torch.cuda.is_available():
            return "the run is on the CPU (efficiency.device)"
        return "torch sees no CUDA device"
    if not isinstance(dataset, TrainDataset):
        return "it is for pre-training only"
    source = dataset.source
    if isinstance(source, CachedDataset):
        if not source.is_rgb:
            return "the images in memory do not have 3 channels of 8 bits"
    elif not isinstance(source, DecodedDataset):
        return "the images are not files"
    elif source.channels != 3:
        return f"model.channels is {source.channels}, not 3"
    if dataset.config.augment:
        return "RandAugment (data.augment) runs on the CPU"
    return None


def _find_decoder(device: torch.device, preferred: str | None = None) -> tuple[Decode | None, str]:
    """Return the first library that decodes a small JPEG on a device, and its name.

    The preferred one is tried first. The name includes why earlier ones failed.
    """
    jpeg = encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # decoders write to memory in use: see `decode_ahead`
    faults = []
    libraries = {"TorchCodec": _decode_torchcodec, "torchvision": decode_torchvision}
    for name, decode in sorted(libraries.items(), key=lambda item: item[0] != preferred):
        try:
            shapes = [tuple(image.shape) for image in decode([jpeg, jpeg], device)]
        except Exception as error:  # not installed, without CUDA, or no nvJPEG for this GPU
            faults.append(f"{name}: {one_line(error)[:200]}")
            continue
        if shapes == [(3, 16, 16)] * 2:
            return decode, name + (f" ({'; '.join(faults)})" if faults else "")
        faults.append(f"{name}: images of {shapes}")
    return None, (
        "neither TorchCodec (the extra gpu: pip install '.[gpu]') nor torchvision decodes a JPEG "
        f"there: {'; '.join(faults)}"
    )


def _decode_torchcodec(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchcodec.decoders import decode_jpeg

    return list(decode_jpeg(contents, mode="RGB", device=device))


def decode_torchvision(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode with torchvision, whose decoders have been deprecated since 0.29."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(contents, ImageReadMode.RGB, device)
