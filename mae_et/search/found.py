"""What a search ends with."""

from dataclasses import dataclass
from typing import Literal

from mae_et.config.schema import Stage


@dataclass(frozen=True)
class Found:
    """A curriculum, and how it was judged."""

    stages: tuple[Stage, ...]
    value: float
    """The objective of the trial that decided."""
    trial: str
    """Name of that trial."""
    shares_of: Literal["compute", "images"] = "compute"
    """What the stages' shares divide."""
