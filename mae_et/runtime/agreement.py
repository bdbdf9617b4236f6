"""Check before training that all ranks agree.

Ranks with different settings, data, code or weights would average gradients of different runs:
nothing fails, and the weights are wrong. Every function here with `world` is a collective.
"""

import hashlib
import importlib.util
import json
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et.errors import RunFailed, UserError
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.version import __version__

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "Pillow")
"""Libraries whose version may change the numbers of a rank."""


def check_ranks_agree(
    facts: Mapping[str, Any],
    world: DistributedContext,
    kind: type[UserError] | type[RunFailed] = UserError,
) -> None:
    """Compare facts, as their `repr`, over all ranks; equal ones cost one exchange of 16 bytes.

    If a rank differs from rank 0, every rank raises an error of a `kind`, with a sentence that
    names the rank, its node, and what differs.
    """
    if world.size == 1:
        return
    mine = {name: repr(value) for name, value in facts.items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    if distributed.all_ranks_equal(int.from_bytes(digest[:7]), world):
        return
    everyone = all_gather_json({"node": socket.gethostname(), "facts": mine}, world)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in first["facts"] | other["facts"]:
            here, there = (each["facts"].get(name, "not known") for each in (first, other))
            if here != there:
                raise kind(
                    f"rank {rank} (on {other['node']}) differs from rank 0 (on {first['node']}): "
                    f"{name} is {there} there and {here} on rank 0; nothing was trained"
                )


@contextmanager
def fail_together(world: DistributedContext) -> Iterator[None]:
    """Raise a UserError or RunFailed of one rank on all ranks, which would otherwise hang.

    Other ranks name that rank and its node. The block may not have collectives.
    """
    failure: UserError | RunFailed | None = None
    try:
        yield
    except (UserError, RunFailed) as error:
        failure = error
    if not distributed.any_rank(failure is not None, world):
        return
    mine = {"node": socket.gethostname(), "sentence": str(failure or "")}
    everyone = all_gather_json(mine | {"status": 2 if isinstance(failure, UserError) else 1}, world)
    if failure is not None:
        raise failure
    rank, other = next(pair for pair in enumerate(everyone) if pair[1]["sentence"])
    kind = UserError if other["status"] == 2 else RunFailed
    raise kind(f"rank {rank} (on {other['node']}) failed: {other['sentence']}")


@cache  # reading the sources takes 28 ms
def code_version(module: str) -> dict[str, str]:
    """Return what may change a command's numbers: versions, and digests of the sources it runs.

    These are mae_et's, and those of the package of the module that defines the command's config.
    """
    found = {"mae-et": __version__} | {name: version(name) for name in LIBRARIES}
    for package in sorted({"mae_et", module.partition(".")[0]}):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        found[f"the code of {package}"] = source_digest(Path(spec.submodule_search_locations[0]))
    return found


def source_digest(package: Path) -> str:
    """Return a digest of a package's source files.

    `benchmarks` does not count: in a clone it lies beside mae_et, elsewhere inside.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith("benchmarks/"):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a CRC-32 of each tensor's bytes, by name (0.3 s per 10^9 bytes on one core)."""
    flat = {name: each.detach().cpu().contiguous().flatten() for name, each in tensors.items()}
    return {name: zlib.crc32(each.view(torch.uint8).numpy().data) for name, each in flat.items()}


def all_gather_json(content: Any, world: DistributedContext) -> list[Any]:
    """Gather content as JSON from every rank, in rank order; nothing is unpickled."""
    line = torch.frombuffer(bytearray(json.dumps(content).encode() + b"\n"), dtype=torch.uint8)
    lines = distributed.all_gather_rows(line, world).numpy().tobytes().splitlines()
    return [json.loads(each) for each in lines]
