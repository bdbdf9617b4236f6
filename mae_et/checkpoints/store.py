"""Checkpoints: written atomically, found by listing, refused when damaged.

A checkpoint is one file `step-00001234.pt` of tensors and plain types, so that loading executes
nothing. It is written under a temporary name in the same folder, flushed to disk and then renamed.
The newest checkpoint is the highest step that loads: no link or index can disagree with the files.
"""

import errno
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mae_et.checkpoints.checksums import Damaged, SealedArchive, check_archive, is_cut_short
from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.checkpoints.weight_files import describe_refusal, summarise_error
from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically
from mae_et.runtime.console import notify
from mae_et.runtime.watchdog import heartbeat
from mae_et.version import __version__

FORMAT = "mae-et/1"
# Errors that reading an intact file may raise: permissions, memory, an unreachable file server.
_NOT_NOW = frozenset({
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
    errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN,
})  # fmt: skip


def save_checkpoint(
    folder: Path,
    state: dict[str, Any],
    config: str,
    plan: dict[str, Any],
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of a state (`TrainState.to_dict`), and return its path.

    Its config (YAML), plan and provenance are written beside the state.
    """
    path = folder / f"step-{state['step']:08d}.pt"
    payload = {"format": FORMAT, "config": config, "plan": plan, "origin": provenance, **state}

    def write(temporary: Path) -> None:
        with temporary.open("wb", buffering=0) as file:
            archive = SealedArchive(file)
            try:
                torch.save(payload, archive)  # type: ignore[arg-type]
            except RuntimeError:
                if archive.error is None:
                    raise
                raise archive.error from None
            archive.seal()
        heartbeat()

    write_atomically(path, write)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    The entry `path` is the file, and `origin` its recorded provenance, empty if there is none.

    Raises:
        UserError: another version of mae-et saved it, in another format.
        ValueError: the file is damaged, or not a checkpoint.
        OSError: the system cannot read the file at present; its content may be intact.
    """
    try:
        if not check_archive(path):
            if is_cut_short(path):
                raise Damaged(f"{path} is damaged: it is cut short")
            raise Damaged(
                f"{path} is damaged, or not a checkpoint of a run: it has no checksum, "
                "like those of early versions"
            )
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {describe_refusal(error)}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NOT_NOW:
            raise
        raise ValueError(f"{path} is damaged: {summarise_error(error)}") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != FORMAT:
        if str(found).startswith("mae-et/"):
            raise UserError(
                f"{path} was saved by another version of mae-et: its format is {found}, this "
                f"version ({__version__}) reads {FORMAT}"
            )
        raise ValueError(f"{path} is not a checkpoint of a mae-et run")
    return payload | {"path": str(path), "origin": payload.get("origin") or {}}


def newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read a folder's newest checkpoint that loads; see `last_that_loads`."""
    return last_that_loads(list_checkpoints(folder))


def newest_of_run(folder: Path) -> dict[str, Any] | None:
    """Read a run's newest checkpoint for its weights; report if the run is not finished."""
    saved = newest_checkpoint(folder / "checkpoints")
    if saved is not None and saved["step"] < (steps := Plan.from_dict(saved["plan"]).steps):
        notify(f"{folder} is not finished: its weights after step {saved['step']} of {steps}")
    return saved


def last_that_loads(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Read the last of some checkpoints that loads, with a warning for each later one.

    Raises:
        UserError: another version of mae-et saved one, in another format.
    """
    for place, path in reversed(list(enumerate(paths))):
        try:
            return load_checkpoint(path)
        except UserError:
            raise  # an earlier checkpoint would discard the steps of the other version
        except ValueError as error:
            then = "falling back to the one before it" if place else "there is no earlier one"
            warnings.warn(f"{error}; {then}", stacklevel=2)
    return None


def rename_damaged_after(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step, which failed to load, to `*.damaged`.

    Raises:
        UserError: one loads: another run has saved it since this one listed the folder.
    """
    for path in list_checkpoints(folder):
        if checkpoint_step(path) > step:
            if _loads(path):
                raise UserError(
                    f"another process has continued the run in {folder.parent} since this one "
                    f"read step {step}: {path.name} exists; start again"
                )
            path.rename(path.with_name(f"{path.name}.damaged"))


def _loads(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


def prune_checkpoints(folder: Path, keep_last: int, keeps: Callable[[int], bool]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those whose step `keeps` names."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if not keeps(checkpoint_step(path)):
            path.unlink(missing_ok=True)  # a user may have deleted it
