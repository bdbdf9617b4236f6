"""Find a run's newest checkpoint, and whether the run is finished."""

import warnings
from pathlib import Path
from typing import Any

import torch

from mae_et.checkpoints.listing import list_checkpoints
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.schema import RunConfig
from mae_et.errors import RunFailed, UserError
from mae_et.io.plain_files import read_mapping
from mae_et.io.score_records import RESULTS
from mae_et.runtime.agreement import check_ranks_agree, fail_together
from mae_et.runtime.broadcast import broadcast_outline, broadcast_tensors
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.resume.outputs import missing_outputs
from mae_et.training.resume.same_run import check_same_run


def find_checkpoint(
    config: RunConfig, world: DistributedContext
) -> tuple[dict[str, Any] | None, bool]:
    """Return the newest checkpoint of the run folder (None: new run), and whether it is finished.

    Only the main rank reads the checkpoint; see `share_checkpoint`. A run with a missing output is
    not finished: the outputs are written again, from its last checkpoint if there is one.

    Raises:
        UserError: the folder holds another run, or only checkpoints that do not load.
        RunFailed: ranks see different checkpoints, results or outputs.
    """
    folder = config.output.dir
    checkpoints = folder / "checkpoints"
    with fail_together(world):
        saved = newest_checkpoint(checkpoints) if world.is_main else None
    saved = share_checkpoint(saved, world)
    with fail_together(world):
        finished = _has_results(folder, saved)
        if saved is None and not finished and (damaged := list_checkpoints(checkpoints)):
            # Starting over would discard the record, and days of work.
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {checkpoints} loads; nothing was "
                "changed: restore a copy of one, or delete them to start at step 0"
            )
        check_same_run(config, saved, finished)
    newest = next(iter(list_checkpoints(checkpoints)[::-1]), None)
    missing = missing_outputs(config)
    present = {RESULTS: finished} | {name: name not in missing for name in config.outputs}
    found = {f"the newest checkpoint of {folder.name}": newest.name if newest else "absent"}
    found |= {f"its {name}": "present" if has else "absent" for name, has in present.items()}
    check_ranks_agree(found, world, RunFailed)  # if a shared folder lags, a later start agrees
    # Without a checkpoint, missing outputs cannot be written.
    return saved, finished and (saved is None or not missing)


def share_checkpoint(
    saved: dict[str, Any] | None, world: DistributedContext
) -> dict[str, Any] | None:
    """Return the main rank's checkpoint on every rank.

    The others receive its weights on the CPU but only an outline of the optimizer's states
    (`optimizer_on_main`), which `build_run` sends to the device. Every rank must call this.
    """
    outline = broadcast_outline(saved, world)
    if outline is None or world.size == 1:
        return saved
    rest = {key: value for key, value in outline.items() if key != "optimizer"}
    shared: dict[str, Any] = broadcast_tensors(rest, world, torch.device("cpu"))
    return shared | {"optimizer": outline["optimizer"], "optimizer_on_main": True}


def _has_results(folder: Path, saved: dict[str, Any] | None) -> bool:
    """Return whether results.json exists; a damaged one is written again from the checkpoint.

    Raises:
        UserError: the file is damaged, and there is no checkpoint.
    """
    path = folder / RESULTS
    if not path.exists():
        return False
    try:
        read_mapping(path)
    except UserError as error:
        if saved is None:
            raise
        warnings.warn(f"{error}; it is written again", stacklevel=2)
        return False
    return True
