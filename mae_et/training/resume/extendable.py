"""Refuse to extend a run whose config rules it out, before PyTorch is loaded."""

from pathlib import Path

from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError


def check_extendable(run: Path, before: PretrainConfig, epochs: float) -> None:
    """Refuse a run whose schedules move over all of it, or a budget that is not larger."""
    if before.optim.decay_fraction is None:
        raise UserError(
            f"{run} cannot be extended: its learning rate falls as a cosine from the warm-up to "
            f"the end (no optim.decay_fraction); --branch-from {run} continues it, with a jump of "
            f"the learning rate, and --init {run} starts from its weights with a new warm-up"
        )
    if before.optim.weight_decay_end is not None:
        raise UserError(
            f"{run} cannot be extended: its weight decay moves over the whole run "
            "(optim.weight_decay_end), so no step of it belongs to a longer run"
        )
    if not epochs > before.curriculum.epochs:
        raise UserError(
            f"curriculum.epochs {epochs:g} must exceed the budget of the run to extend "
            f"({before.curriculum.epochs:g})"
        )
