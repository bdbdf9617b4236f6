"""Try a device on images of a run: check the views that it makes, and measure its speed."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_et.data.device.decode_ahead import DeviceDecoder, decoded_ahead
from mae_et.data.device.encoded import EncodedDataset, EncodedView, PackedBatch
from mae_et.data.sampler import SampleIndex
from mae_et.data.train_dataset import TrainDataset

SAMPLE = 64
MICRO_BATCH, MICRO_BATCHES = 256, 8
"""Size and number of the micro-batches to time the device with; the sample is repeated."""
SECONDS = 1.0
"""Time limit of each measurement: reading, decoding on the CPU, decoding on the device."""
MEDIAN_DECIBELS, LEAST_DECIBELS = 35.0, 25.0
"""Minimum PSNR of a decoder's views against the CPU's: median and lowest of the sample.

Decoders round differently, most of all the colours of JPEGs with subsampled chroma. A box that is
off by a pixel, or swapped colour channels score lower.
"""


class Trial(NamedTuple):
    """Images per second of a rank with its loader processes, and why the device is unfit, if so."""

    device: float = 0.0
    cpu: float = 0.0
    fault: str = ""


def try_decoder(
    decoder: DeviceDecoder, dataset: TrainDataset, num_workers: int, stage: int
) -> Trial:
    """Make views of some images at a stage, on the device and on the CPU, in two or three seconds.

    The images are evenly spaced. Loading rates are those of this process times the number of loader
    processes; the device's rate includes the images that it leaves to the CPU.
    """
    encoded = EncodedDataset(dataset, dataset)
    indices = _spread(dataset, stage)
    indices = indices[: len(_in_time(encoded.__getitem__, indices))]  # read from disk
    read, reading = _timed(lambda: _in_time(encoded.__getitem__, indices))
    for_device = [each for each in read if isinstance(each, EncodedView)]
    if 2 * len(for_device) < len(read):
        return Trial(fault="most images are neither in memory nor baseline JPEGs")
    views, cpu = _timed(lambda: _in_time(dataset.__getitem__, indices))
    expected = {i: view.images for i, view in zip(indices, views, strict=False) if view is not None}
    made = [each for each in for_device if each.sample_index in expected]
    if not made:
        return Trial(fault="none of the images that were tried can be read")
    repeated = made * max(1, MICRO_BATCH // len(made))
    packed, packing = _timed(lambda: EncodedDataset.collate(repeated))
    try:
        images, decoding = _decode(packed, decoder, dataset)
    except Exception as error:  # decoders raise many types
        first_line = str(error).strip().partition("\n")[0]
        return Trial(fault=f"the GPU's decoder failed ({type(error).__name__}: {first_line})")
    processes = max(1, num_workers)
    loading = (reading / len(read) + packing / len(repeated)) / processes
    return Trial(
        1 / max(loading, decoding * len(for_device) / len(read)),
        len(views) / cpu * processes,
        _difference(
            images[: len(made)], torch.stack([expected[each.sample_index] for each in made])
        ),
    )


def _spread(dataset: TrainDataset, stage: int) -> list[SampleIndex]:
    indices = sorted({n * len(dataset) // SAMPLE for n in range(SAMPLE)})
    return [SampleIndex(index, 0, stage) for index in indices]


def _in_time(work: Callable[[Any], Any], indices: Iterable[SampleIndex]) -> list[Any]:
    """Return the results of work on as many samples as `SECONDS` allow; None where it fails.

    Unreadable images are reported when they are trained on.
    """
    ends, results = time.perf_counter() + SECONDS, []
    for index in indices:
        try:
            results.append(work(index))
        except Exception:
            results.append(None)
        if time.perf_counter() > ends:
            break
    return results


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    before = time.perf_counter()
    return work(), time.perf_counter() - before


def _decode(packed: PackedBatch, decoder: DeviceDecoder, views: Any) -> tuple[Tensor, float]:
    """Return a micro-batch's images on the CPU, made as in training, and seconds per image."""
    if decoder.device.type == "cuda":  # as the loader does
        packed = packed._replace(content=packed.content.pin_memory())
    with decoded_ahead(iter([packed]), decoder, views) as batches:  # also warms up the library
        (batch,) = batches
    images, count, before = batch.images.cpu(), 0, time.perf_counter()
    with decoded_ahead(_repeated(packed), decoder, views) as batches:
        for batch in batches:
            count += len(batch.images)
        batch.images[:1].cpu()  # waits for the device
    return images, (time.perf_counter() - before) / count


def _repeated(packed: PackedBatch) -> Iterator[PackedBatch]:
    ends = time.perf_counter() + SECONDS
    for _ in range(MICRO_BATCHES):
        yield packed
        if time.perf_counter() > ends:
            return


def _difference(images: Tensor, expected: Tensor) -> str:
    """Return how images [N C S S] differ beyond the tolerance; empty if they do not."""
    error = (images.float() - expected.float()).square().mean(dim=(1, 2, 3))
    decibels = 10 * torch.log10(255**2 / error.clamp(min=1e-3))
    median, least = decibels.median().item(), decibels.min().item()
    if median >= MEDIAN_DECIBELS and least >= LEAST_DECIBELS:
        return ""
    return (
        f"the GPU's views differ from the CPU's (PSNR {median:.0f} dB in the median, {least:.0f} "
        f"at least; {MEDIAN_DECIBELS:.0f} and {LEAST_DECIBELS:.0f} are required)"
    )
