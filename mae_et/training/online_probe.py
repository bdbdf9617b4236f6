"""Probe the encoder during pre-training, to see whether it learns.

The loss does not show it, because it jumps with the curriculum. A probe draws none of the run's
random numbers and changes none of its state, and its time does not count as training.

Shapes: N images, D width.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mae_et.config.probe import OnlineProbeConfig
from mae_et.curriculum.mae_cost import FORWARD_AND_BACKWARD
from mae_et.curriculum.plan import Plan
from mae_et.data.cores import worker_count
from mae_et.data.datasets import ImageDataset
from mae_et.data.loader import batches_of, data_loader
from mae_et.data.probe_images import CentreCrops, open_probe_images
from mae_et.data.transforms import normalise, seeded
from mae_et.models.features import pool_tokens
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.summaries import PROBED_IMAGES
from mae_et.probing.effective_rank import effective_rank
from mae_et.probing.labelled import Labelled
from mae_et.probing.nearest_neighbours import knn_accuracy
from mae_et.probing.ridge_classifier import ridge_accuracy
from mae_et.runtime import distributed
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.console import notify
from mae_et.runtime.precision import autocast, exact_products
from mae_et.runtime.watchdog import heartbeat
from mae_et.training.periodic import Periodic
from mae_et.training.reconstructions import gather_model
from mae_et.training.run import Run

BATCH_SIZE = 256
MAX_CACHED_BYTES = 256 * 2**20
"""Maximum memory to keep the images of a probe; larger ones are loaded for each probe."""

Batches = list[tuple[Tensor, Tensor]]
"""Images [B C H W] and labels [B]."""


class OnlineProbe(Periodic):
    """kNN, ridge classifier and effective rank of the encoder, every `probe.every`.

    Every rank encodes its part of the images. A sharded model is gathered on the main rank, which
    encodes all images.
    """

    before_first_step = True

    def __init__(self, run: Run, probe: OnlineProbeConfig, source: ImageDataset):
        assert probe.every is not None
        super().__init__(run, probe.every)
        config, plan = run.config, run.plan
        steps = {*range(0, plan.steps, self.every), plan.steps}
        fraction = probe.max_fraction / sum(map(self.due, steps))
        most = affordable_images(plan, config.model.mask_ratio, fraction)
        with fail_together(run.world):
            self.images = open_probe_images(
                probe, config.data, source, config.model.channels, most, config.seed
            )
        self.num_workers = worker_count(config.efficiency.num_workers, run.world)
        self.cached: dict[str, Batches] = {}

    def do(self, logger: RunLogger | None) -> None:
        """Probe the current weights."""
        state, world = self.run.state, self.run.world
        if world.device.type == "cuda":
            torch.cuda.synchronize()  # the probe's time excludes queued steps
        started = time.perf_counter()
        model = gather_model(self.run)
        if state.sharded and not world.is_main:
            while not distributed.any_rank(False, world):  # until the main rank is done
                heartbeat()
            return
        if state.sharded:
            model.decoder = None  # the gathered copy's, not needed on the device
        model = model.to(world.device).eval()
        with torch.no_grad(), seeded(self.run.config.seed):
            train, val = (self._encode(model, part) for part in ("train", "val"))
        model.train()
        if state.sharded:
            distributed.any_rank(True, world)
        if logger is not None:
            self._report_unreadable(len(train[0]), len(val[0]))
            scores = measure(*((x.to(world.device), y.to(world.device)) for x, y in (train, val)))
            scores |= dict(zip(PROBED_IMAGES, (len(train[0]), len(val[0])), strict=True))
            scores["probe_seconds"] = time.perf_counter() - started
            logger.log_scores(state.step, scores)

    def _encode(self, model: MaskedAutoencoder, part: str) -> Labelled:
        """Return the features and labels of a part's images, from all ranks, on the CPU."""
        run, data = self.run, self.images.data
        device = run.world.device
        vectors, labels = [torch.empty(0, model.encoder.embed_dim)], [torch.empty(0).long()]
        for pixels, batch_labels in self._batches(part):
            pixels = normalise(pixels.to(device), data.mean, data.std)
            with autocast(run.dtype, device):
                tokens = model.encode(pixels)
            vectors.append(pool_tokens(model.encoder, tokens.float(), "mean").cpu())
            labels.append(batch_labels)
            heartbeat()
            if run.state.sharded:
                distributed.any_rank(False, run.world)  # for the heartbeats of the others
        features, truth = torch.cat(vectors), torch.cat(labels)
        if not run.state.sharded:
            features = distributed.all_gather_rows(features, run.world)
            truth = distributed.all_gather_rows(truth, run.world)
        return features, truth

    def _report_unreadable(self, train: int, val: int) -> None:
        """Report how many of the chosen images could not be read, if any."""
        chosen = {"training": self.images.train_indices, "validation": self.images.val_indices}
        for (part, indices), count in zip(chosen.items(), (train, val), strict=True):
            if count < len(indices):
                skipped = len(indices) - count
                notify(f"probe: {skipped} of {len(indices)} {part} images unreadable, skipped")

    def _batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's images, uint8 [B C H W], and labels [B]; cached if they are few."""
        if part in self.cached:
            yield from self.cached[part]
            return
        run = self.run
        batch_size = min(BATCH_SIZE, *run.micro_batch.values())
        kept: Batches | None = []
        loader = data_loader(self._crops(part), self.num_workers, batch_size=batch_size)
        with batches_of(loader) as batches:
            for batch in filter(None, batches):  # None: none of its images could be read
                if kept is not None:
                    # Copied: loader processes return batches in shared memory, which is scarce.
                    kept.append((batch[0].clone(), batch[1].clone()))
                    if sum(pixels.nbytes for pixels, _ in kept) > MAX_CACHED_BYTES:
                        kept = None
                yield batch
        if kept is not None:
            self.cached[part] = kept

    def _crops(self, part: str) -> CentreCrops:
        """Return the crops of this rank; with a sharded model, the main rank's are all."""
        images, world = self.images, self.run.world
        source = images.train if part == "train" else images.val
        indices = images.train_indices if part == "train" else images.val_indices
        mine = indices if self.run.state.sharded else indices[world.rank :: world.size]
        return CentreCrops(source, images.data, self.run.config.model.image_size, mine)


def measure(train: Labelled, val: Labelled) -> dict[str, float | None]:
    """Measure features: `knn` and `ridge`, top-1 in percent, and `effective_rank`.

    Products are exact float32 regardless of `efficiency.tf32`, as in `mae-et knn`. Accuracies are
    omitted without features to classify. Values are None if a feature is not finite.
    """
    finite = bool(train[0].isfinite().all() and val[0].isfinite().all())
    measures: dict[str, Callable[[], float]] = {}
    if len(train[0]) and len(val[0]):
        measures["knn"] = lambda: knn_accuracy(train, val)
        measures["ridge"] = lambda: ridge_accuracy(train, val)
    if len(train[0]):
        measures["effective_rank"] = lambda: effective_rank(train[0])
    with exact_products():
        return {name: value() if finite else None for name, value in measures.items()}


def affordable_images(plan: Plan, mask_ratio: float, fraction: float) -> int:
    """Return the number of images that can be encoded in a fraction of a run's time.

    Training on an image takes three passes of the encoder over its visible patches, plus the
    decoder; probing takes one pass over all patches. Loading a probe's image is assumed to take as
    long as loading a training image at the base size.
    """
    trained = plan.compute / plan.base_cost  # images at the base size, of the same compute
    return int(fraction * trained * min(1.0, FORWARD_AND_BACKWARD * (1 - mask_ratio)))
