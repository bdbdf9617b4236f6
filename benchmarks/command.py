"""Benchmarks of `mae-et bench` by name: their config and function."""

from collections.abc import Callable
from typing import Any

from mae_et.benchmarks.loader import LoaderConfig, bench_loader
from mae_et.benchmarks.quality import QualityConfig, bench_quality
from mae_et.benchmarks.step import StepConfig, bench_crop, bench_step
from mae_et.benchmarks.whole_run import WholeRunConfig, bench_run

BENCHMARKS: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "step": (StepConfig, bench_step),
    "loader": (LoaderConfig, bench_loader),
    "crop": (StepConfig, bench_crop),
    "quality": (QualityConfig, bench_quality),
    "run": (WholeRunConfig, bench_run),
}
