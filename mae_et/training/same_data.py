"""Refuse to resume a run on other data, or replay on another number of ranks."""

from typing import Any

from mae_et.config.schema import RunConfig
from mae_et.data.datasets import ImageDataset
from mae_et.data.fingerprint import fingerprint
from mae_et.errors import UserError
from mae_et.runtime.agreement import check_ranks_agree
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.watchdog import heartbeat
from mae_et.training.same_code import code_of, report_other_code


def check_data(
    config: RunConfig,
    saved: dict[str, Any] | None,
    dataset: ImageDataset,
    world: DistributedContext,
) -> dict[str, Any]:
    """Return the provenance of a run's numbers (`provenance_of`, and `code`: see `code_of`).

    It is compared with the checkpoint's; a line reports other code.

    Raises:
        UserError: the checkpoint was trained on other data, or a rank sees other data.
    """
    heartbeat()
    provenance = provenance_of(dataset, world, saved) | {"code": code_of(config)}
    images = len(dataset)
    facts = {"the number of images": images, "the digest of their names": provenance["data"]}
    check_ranks_agree(facts, world)
    check_same_data(config, saved, images, provenance)
    report_other_code(saved, provenance["code"])
    return provenance


def provenance_of(
    source: ImageDataset, world: DistributedContext, saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a run's numbers depend on besides its config.

    Returns:
        `data`: hash of the data; `processes`: number of ranks; `decode`: `cpu` or the library that
        has decoded so far (None for a new run, `cpu` if the checkpoint does not record it);
        `decode_cpu_sides`: see `DeviceDecoder`.
    """
    origin = {"decode": None} if saved is None else saved["origin"]
    return {
        "data": fingerprint(source),
        "processes": world.size,
        "decode": origin.get("decode", "cpu"),
        "decode_cpu_sides": origin.get("decode_cpu_sides", ()),
    }


def check_same_data(
    config: RunConfig, saved: dict[str, Any] | None, images: int, provenance: dict[str, Any]
) -> None:
    """Refuse a checkpoint of other images or, if images are replayed, of another number of ranks.

    Without replay, the samples of a step do not depend on the number of ranks.
    """
    if saved is None:
        return
    folder, before = config.output.dir, saved["origin"]
    if saved["plan"]["dataset_size"] != images:
        raise UserError(
            f"{folder} holds a checkpoint of another run: the dataset had "
            f"{saved['plan']['dataset_size']} images and now has {images}; give another "
            "output.dir"
        )
    if before.get("data", provenance["data"]) != provenance["data"]:
        raise UserError(
            f"{folder} holds a checkpoint of another run: the dataset has as many images, but "
            "other names or labels or another order; give another output.dir"
        )
    ranks = provenance["processes"]
    if config.data.replay and before.get("processes", ranks) != ranks:
        raise UserError(
            f"{folder} holds a checkpoint of {before['processes']} ranks and cannot resume on "
            f"{ranks}: each rank replays the images that it loaded (data.replay); "
            "start as many ranks"
        )
