"""Refuse to resume a run on other data, or replay on another number of ranks; report other code."""

from pathlib import Path
from typing import Any

from mae_et.config.plain_yaml import parse_yaml
from mae_et.config.schema import RunConfig
from mae_et.data.datasets import ImageDataset
from mae_et.data.fingerprint import fingerprint
from mae_et.errors import UserError
from mae_et.runtime.agreement import check_ranks_agree, code_version
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.watchdog import heartbeat


def check_data(
    config: RunConfig,
    saved: dict[str, Any] | None,
    dataset: ImageDataset,
    world: DistributedContext,
) -> dict[str, Any]:
    """Return what a run's numbers depend on besides its config, compared with its checkpoint.

    Other data is refused; other code is reported in a line.

    Returns:
        `data`: hash of the data; `processes`: number of ranks; `decode`: `cpu` or the library that
        has decoded so far (None for a new run, `cpu` if the checkpoint does not record it);
        `decode_cpu_sides`: see `DeviceDecoder`; `code`: see `code_version`; `parent`: see
        `branch.read_parent`, if the run continues another one.
    """
    heartbeat()
    origin = {"decode": None} if saved is None else saved["origin"]
    provenance: dict[str, Any] = {
        "data": fingerprint(dataset),
        "processes": world.size,
        "decode": origin.get("decode", "cpu"),
        "decode_cpu_sides": origin.get("decode_cpu_sides", ()),
        "code": code_version(type(config).__module__),
    }
    if parent := origin.get("parent"):
        provenance["parent"] = parent
    images = len(dataset)
    facts = {"the number of images": images, "the digest of their names": provenance["data"]}
    check_ranks_agree(facts, world)
    if saved is not None:
        check_same_data(config, saved, images, provenance)
        if moved := moved_data(config, saved):
            notify(f"{moved}, with the same {images} images (their names, labels and order)")
        report_other_code(saved, provenance["code"])
    return provenance


def moved_data(config: RunConfig, saved: dict[str, Any]) -> str:
    """Describe a `data.root` other than the checkpoint's; empty for the same."""
    before, now = parse_yaml(saved["config"])["data"]["root"], config.data.root
    if before is None or now is None or Path(before).absolute() == now.absolute():
        return ""
    return f"data.root was {before} and is now {now}"


def check_same_data(
    config: RunConfig, saved: dict[str, Any], images: int, provenance: dict[str, Any]
) -> None:
    """Refuse a checkpoint of other images or, if images are replayed, of another number of ranks.

    Without replay, the samples of a step do not depend on the number of ranks.
    """
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


def report_other_code(saved: dict[str, Any], now: dict[str, str]) -> None:
    """Print a line if a checkpoint was saved with other code, which may move later numbers."""
    before = saved["origin"].get("code")
    if not isinstance(before, dict):
        other = "an earlier version of mae-et, which it does not record"
    elif changed := [name for name in now if before.get(name) != now[name]]:
        other = ", ".join(f"{name} {before.get(name)} (now {now[name]})" for name in changed)
    else:
        return
    notify(f"step {saved['step']:,} was saved with {other}: later numbers may move (CHANGELOG.md)")
