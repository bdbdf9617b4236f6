"""Config and function of each benchmark of `mae-et bench`, by name."""

from collections.abc import Callable
from typing import Any

from .launches import LaunchesConfig, bench_launches
from .loader import LoaderConfig, bench_loader
from .quality import QualityConfig, bench_quality
from .step import StepConfig, bench_crop, bench_step
from .whole_run import WholeRunConfig, bench_run

BENCHMARKS: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "step": (StepConfig, bench_step),
    "launches": (LaunchesConfig, bench_launches),
    "loader": (LoaderConfig, bench_loader),
    "crop": (StepConfig, bench_crop),
    "quality": (QualityConfig, bench_quality),
    "run": (WholeRunConfig, bench_run),
}
