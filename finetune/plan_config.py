"""The config of `mae-et plan` for classifiers."""

from dataclasses import dataclass

from finetune.config import ClassifierConfig
from mae_et.config.commands import PlanOptions


@dataclass(frozen=True, kw_only=True)
class ClassifierPlanConfig(PlanOptions, ClassifierConfig):
    """Print stages, steps and cost of training a classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_options()
