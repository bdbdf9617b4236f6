"""Decode, crop and resize the images of micro-batches on a device, ahead of training.

    loader processes        two threads                              training thread
    bytes, boxes, noise ->  decode -> crop, resize and flip     ->   `Batch` on the device

The box, flip and mask of an image are those of `TrainDataset`; its pixels differ by the decoder's
rounding. `TrainDataset` makes the views that the device refuses to decode, in their places in the
batch, so that the same images are replaced (`data.on_error`) as without a device.

A micro-batch is decoded while the previous one is resized. Images in memory (`data.cache`) are not
decoded: the rows of their boxes are copied to the device.

Memory: at most `AHEAD` micro-batches are on their way, each as files on the host or as finished
images on the device. A thread holds up to `MAX_DECODED_BYTES` of whole images there and, while it
resizes, about 0.3 GiB more with Triton's kernels. The products need about four canvases of
`box_resize.MAX_NUMBERS`: 1 GiB per thread, or 2 GiB if images have `encoded.MAX_DEVICE_PIXELS`.

nvJPEG's hardware engine does not wait for the stream that it is given (pytorch/vision#9606,
meta-pytorch/torchcodec#1634): it writes to memory that the caching allocator has handed out again
while queued kernels still read it. So each thread has its own stream, which allocates from a
separate pool and is synchronized before each call of the decoder.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae_et.data.batch import Batch
from mae_et.data.cached_dataset import CachedDataset
from mae_et.data.device.box_resize import Resize, resize_boxes
from mae_et.data.device.encoded import FilePlace, PackedBatch
from mae_et.data.device.self_checks import Decode
from mae_et.data.device_copy import copy_to
from mae_et.data.sampler import SampleIndex
from mae_et.runtime.console import notify
from mae_et.runtime.system_errors import is_out_of_gpu_memory

AHEAD = 2
THREADS = 2
MAX_DECODED_BYTES = 3 * 2**27
"""A micro-batch of 512 ImageNet images takes 0.28 GB, and is decoded by one call."""
PRIORITY = -1
"""Priority of the streams; lower numbers mean higher priority, and training has 0."""


class Decoded(NamedTuple):
    """A micro-batch made by a decoder."""

    batch: Batch
    refused: list[int]
    """Positions of images that the device did not decode; their pixels are undefined."""
    indices: np.ndarray
    """int64 [B 3]: see `PackedBatch`."""
    done: Any
    """Event of the decoder's stream; None on a CPU."""


class DeviceDecoder:
    """Turn packed micro-batches into batches on a device; a CPU runs the same code, for tests.

    The images of each stage have a side in `sides`. `decode` is a function that decodes contents,
    or the dataset that holds decoded images (`data.cache`); `resize` crops, resizes and flips them.
    At `cpu_sides`, loader processes decode instead, because they are faster.
    """

    def __init__(
        self,
        device: torch.device,
        sides: Sequence[int],
        decode: Decode | CachedDataset,
        resize: Resize = resize_boxes,
        library: str = "torchvision",
        cpu_sides: tuple[int, ...] = (),
    ):
        self.library, self.cpu_sides = library, cpu_sides
        self.device, self.sides, self.decode, self.resize = device, sides, decode, resize
        on_gpu = device.type == "cuda"
        # For the kernels that resize; nvJPEG's run on its own streams, at the training's priority.
        self.streams = [
            torch.cuda.Stream(device, priority=PRIORITY) if on_gpu else None for _ in range(THREADS)
        ]
        # A decoder may read files after its call, until its stream is synchronized before the next.
        self.files_of: dict[Any, Tensor] = {}

    def __call__(self, packed: PackedBatch) -> Decoded:
        """Decode a micro-batch; called by at most `THREADS` threads at a time."""
        stream = self.streams.pop()
        try:
            if stream is None:
                return self._batch(packed, None)
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                decoded = self._batch(packed, stream)
                return decoded._replace(done=stream.record_event())
        finally:
            self.files_of[stream] = packed.content
            self.streams.append(stream)

    def _batch(self, packed: PackedBatch, stream: Any) -> Decoded:
        count, side = len(packed.indices), self.sides[int(packed.stage[0])]
        images = torch.empty(count, 3, side, side, dtype=torch.uint8, device=self.device)
        finished = np.setdiff1d(np.arange(count), packed.files[:, 0])
        if len(finished):
            views = copy_to(packed.views, self.device)
            images[copy_to(torch.from_numpy(finished), self.device)] = views
        if isinstance(self.decode, CachedDataset):
            refused = self._crop(self.decode, packed, images)
        else:
            refused = self._decode(self.decode, packed, images, stream)
        arrays = packed.noise, packed.stage, packed.replaced
        noise, stage, replaced = map(torch.from_numpy, arrays)
        batch = Batch(images, copy_to(noise, self.device), stage, replaced)
        return Decoded(batch, refused, packed.indices, None)

    def _crop(self, stored: CachedDataset, packed: PackedBatch, images: Tensor) -> list[int]:
        """Write views of images in memory to their places in a batch; none are refused."""
        if not len(packed.files):
            return []
        place, _, _, width, top, left, rows, columns, flip = packed.files.T
        sizes, samples = 3 * rows * width, packed.indices[place, 0]
        ends = np.flatnonzero(np.diff(sizes.cumsum() // MAX_DECODED_BYTES)) + 1
        for part in np.split(np.arange(len(place)), ends):
            source = stored.rows(samples[part], top[part], rows[part])
            total, lengths = int(sizes[part].sum()), sizes[part].tolist()
            copies = torch.empty(total, dtype=torch.uint8, device=self.device).split(lengths)
            # One call for all, which releases the GIL; asynchronous if the memory is pinned.
            torch._foreach_copy_(list(copies), source, non_blocking=True)
            shaped = zip(copies, rows[part].tolist(), width[part].tolist(), strict=True)
            whole = [copy.as_strided((3, h, w), (1, 3 * w, 3)) for copy, h, w in shaped]
            boxes = np.stack([0 * top, left, rows, columns], 1)[part].tolist()
            resized = self.resize(whole, boxes, (flip[part] != 0).tolist(), images.shape[-1])
            images[copy_to(torch.from_numpy(place[part]), self.device)] = resized
        return []

    def _decode(
        self, decode: Decode, packed: PackedBatch, images: Tensor, stream: Any
    ) -> list[int]:
        """Write views of JPEGs to their places in a batch; return the places of refused ones."""
        refused: list[int] = []
        chunks = list(_chunks(packed.file_places()))
        contents = packed.content.split([sum(each.length for each in chunk) for chunk in chunks])
        for chunk, content in zip(chunks, contents, strict=True):
            whole = self._images(decode, content, chunk, stream)
            pairs = list(zip(chunk, whole, strict=True))
            refused += [file.place for file, image in pairs if image is None]
            decoded = [image for image in whole if image is not None]
            made = [file for file, image in pairs if image is not None]
            if made:
                boxes, flips = [file.box for file in made], [file.flip for file in made]
                resized = self.resize(decoded, boxes, flips, images.shape[-1])
                places = torch.tensor([file.place for file in made])
                images[copy_to(places, self.device)] = resized
        return refused

    def _images(
        self, decode: Decode, content: Tensor, files: Sequence[FilePlace], stream: Any
    ) -> Sequence[Tensor | None]:
        """Decode adjacent files; None for those that the device refuses, found one by one.

        Errors of earlier work on the device, and out-of-memory errors, are raised: no file causes
        them.
        """
        if stream is not None:
            stream.synchronize()  # see the module's docstring
        contents = list(content.split([file.length for file in files]))
        try:
            images = decode(contents, self.device)
        except Exception as error:  # decoders raise many types, and return no partial result
            if is_out_of_gpu_memory(error):
                raise
            if len(contents) == 1:
                return [None]
            pairs = zip(contents, files, strict=True)
            return [self._images(decode, content, [file], stream)[0] for content, file in pairs]
        # nvJPEG may decode a grey file to one channel.
        rgb = [image.expand(3, -1, -1) if len(image) == 1 else image for image in images]
        return [
            image if image.shape == (3, file.height, file.width) else None
            for image, file in zip(rgb, files, strict=True)
        ]


def _chunks(files: Sequence[FilePlace]) -> Iterator[list[FilePlace]]:
    """Yield files in chunks whose decoded images take at most `MAX_DECODED_BYTES`."""
    chunk: list[FilePlace] = []
    total = 0
    for file in files:
        size = 3 * file.height * file.width
        if chunk and total + size > MAX_DECODED_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(file)
        total += size
    if chunk:
        yield chunk


@contextlib.contextmanager
def decoded_ahead(
    loaded: Iterator[PackedBatch | None], decoder: DeviceDecoder, views: Any
) -> Iterator[Iterator[Batch]]:
    """Iterate over the batches of packed micro-batches, decoded by threads `AHEAD` of their use.

    The caller's thread reads from the loader, so that signals of dead loader processes and seeded
    generators stay in one thread, and raises the errors of the decoding threads in the order of the
    micro-batches. The threads end with the block. `loaded` yields None when the loader stalls, so
    that earlier micro-batches are handed out meanwhile; `views` is the dataset of the samples that
    the device refuses, indexed by `SampleIndex`.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="decode") as threads:
        yield _in_order(loaded, decoder, views, threads)


def _in_order(
    loaded: Iterator[PackedBatch | None],
    decoder: DeviceDecoder,
    views: Any,
    threads: ThreadPoolExecutor,
) -> Iterator[Batch]:
    pending: deque[Future[Decoded]] = deque()
    for packed in loaded:
        if packed is not None:
            pending.append(threads.submit(decoder, packed))
        if len(pending) > (0 if packed is None else AHEAD):
            yield _taken_over(pending.popleft().result(), views)
    while pending:
        yield _taken_over(pending.popleft().result(), views)


def _taken_over(decoded: Decoded, views: Any) -> Batch:
    """Make a batch safe to use on this thread's stream, and complete it."""
    batch = decoded.batch
    if decoded.done is not None:
        stream = torch.cuda.current_stream(batch.images.device)
        stream.wait_event(decoded.done)
        batch.images.record_stream(stream)
        batch.noise.record_stream(stream)
    for place in decoded.refused:
        view = views[SampleIndex(*decoded.indices[place].tolist())]
        batch.images[place] = view.images.to(batch.images.device)
        batch.noise[place] = view.noise.to(batch.noise.device)  # a substitute's may differ
        batch.replaced[place] = view.replaced
    if decoded.refused:
        notify("the decoder of the device refused JPEGs, which are decoded by the CPU instead")
    return batch
