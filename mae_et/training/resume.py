"""Refuse to go on in a run folder with other numbers than those of the run in it."""

import hashlib
from typing import Any

import numpy as np

from mae_et.data.datasets import ImageDataset
from mae_et.data.image_folder import ImageFiles
from mae_et.data.prepared_shards import PreparedShards
from mae_et.data.webdataset import TarShards
from mae_et.errors import UserError
from mae_et.runtime.distributed import DistributedContext


def provenance_of(source: ImageDataset, world: DistributedContext) -> dict[str, Any]:
    """Return what a run's numbers come from beside its config: its data, and how many processes."""
    return {"data": fingerprint(source), "processes": world.size}


def fingerprint(source: ImageDataset) -> str:
    """Return a hash of the number, names and labels of a source's images, in their order.

    Names are relative to the root, so that data may move. Contents are not read, except where
    prepared shards have checksums of them.
    """
    digest = hashlib.sha256(repr((len(source), list(source.classes))).encode())
    inner: Any = getattr(source, "inner", None)
    if isinstance(inner, ImageFiles):
        arrays = [inner.names, inner.labels]
    elif isinstance(inner, TarShards):
        digest.update(repr([path.name for path in inner.paths]).encode())
        arrays = [inner.places]
    elif isinstance(inner, PreparedShards):
        arrays = [inner.rows]
    else:  # sets that are numbered, not named
        arrays = []
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_same_data(
    config: Any, saved: dict[str, Any] | None, images: int, origin: dict[str, Any]
) -> None:
    """Compare data and processes with those of the folder's checkpoint.

    Without replay the samples of a step do not depend on the number of processes.

    Raises:
        UserError: the images are others, or other images would be replayed.
    """
    if saved is None:
        return
    folder, before = config.output.dir, saved.get("origin") or {}
    if saved["plan"]["dataset_size"] != images:
        raise UserError(
            f"{folder} holds a checkpoint of another run: the data had "
            f"{saved['plan']['dataset_size']} images and now have {images}; give another "
            "output.dir"
        )
    if before.get("data", origin["data"]) != origin["data"]:
        raise UserError(
            f"{folder} holds a checkpoint of another run: the data have as many images, but under "
            "other names, labels or in another order; give another output.dir"
        )
    if config.data.replay and before.get("processes", origin["processes"]) != origin["processes"]:
        raise UserError(
            f"{folder} holds a checkpoint of {before['processes']} processes, asked to go on "
            f"with {origin['processes']}: each replays what it loaded itself (data.replay), so "
            "other images would be used again; start as many processes"
        )


def same_world_size(saved: dict[str, Any], world: DistributedContext) -> bool:
    """Return whether there are as many processes as when a checkpoint was saved, if it says so."""
    return (saved.get("origin") or {}).get("processes", world.size) == world.size
