"""Commands before training: what a curriculum costs, which curriculum to take."""

import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from jsonargparse import ArgumentParser

import finetune
from mae_et.cli.arguments import Arguments, config_of, parse_command, parser_of
from mae_et.cli.output import print_json
from mae_et.cli.slurm_jobs import command_line
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.runtime.console import say
from mae_et.search.config import SearchConfig

IMAGENET_1K = 1_281_167


def plan(arguments: Arguments) -> None:
    """Print stages, steps, epochs, images, FLOPs, and the cost against constant bandwidth."""
    config, options = parse_command("plan", arguments, _plan_parser())
    images = options["images"]
    if images is not None and not 0 < images < 10**15:
        raise UserError(f"images must lie in (0, 1e15), got {str(images)[:40]}")
    from mae_et.curriculum.table import COMPUTE_UNITS, plan_table, summarise
    from mae_et.curriculum.throughput import throughput_from_options, throughput_table
    from mae_et.training.plan import plan_new_run

    resolved = plan_new_run(config, count_images(config) if images is None else images)
    unit = COMPUTE_UNITS[config.curriculum.cost]
    summary = summarise(resolved, unit, options["against_epochs"])
    speeds = throughput_from_options(resolved, options)
    if options["json"]:
        print_json(summary | ({} if speeds is None else {"throughput": speeds}))
        return
    print(plan_table(summary))
    if speeds is not None:
        print("\n" + throughput_table(speeds))


def _plan_parser() -> ArgumentParser:
    parser = parser_of("plan")
    add = parser.add_argument
    add("--json", action="store_true", help="print one line of JSON")
    add("--against-epochs", type=float, default=None,
        help="epochs of the constant-bandwidth baseline; by default 1600 (MAE's), below 100 "
        "equivalent epochs those of the plan's own images")  # fmt: skip
    add("--images", type=int, default=None, help="images of an epoch, if the dataset is elsewhere")
    speed = "images/s at each bandwidth, '{96: 5200, 224: 1200}' or a finished run's folder"
    add("--throughput", type=str, default=None,
        help=f"of one GPU: {speed}, or a file of mae-et bench node")  # fmt: skip
    add("--loader", type=str, default=None, help=f"of one loader core: {speed}")
    add("--gpus", type=str, default=None, help="GPU counts: 1,8,64 (1 to 1024)")
    add("--cores-per-gpu", type=float, default=None, help="loader cores of a GPU")
    return parser


def count_images(config: PretrainConfig) -> int:
    """Return the images of an epoch: those of the dataset, or ImageNet-1K's without one."""
    if config.data.source == "folder" and config.data.root is None:
        say("mae-et: no data.root: planned for the images of ImageNet-1K")
        return IMAGENET_1K
    from mae_et.data.datasets import open_dataset

    return len(open_dataset(config.data, "train", config.model.channels))


def search(arguments: Arguments) -> None:
    """Search a curriculum for a dataset and a model; resumes automatically."""
    config: SearchConfig = config_of("search", arguments)
    options = config.search
    flagged = any(word.startswith("--search.objective") for word in arguments)
    objective = _objective(config, flagged)
    from mae_et.search import search
    from mae_et.search.trials import Runner, run_here

    runner: Runner = run_here
    if options.cluster is not None:
        from slurm.trials import ClusterRunner

        runner = ClusterRunner(command_line(), options.cluster, config.output.dir)
    results = search(config, objective, runner, parallel=options.cluster is not None)
    stages = ", ".join(str(bandwidth) for bandwidth in results["bandwidths"])
    say(
        f"mae-et: found {stages}: {options.objective} {results['value']:.2f}; train with: "
        f"mae-et pretrain --config {results['curriculum']}"
    )
    print_json(results)


def _objective(config: SearchConfig, flagged: bool) -> Callable[[Path], float]:
    """Return the function that scores the run folder of a trial.

    Args:
        config: the search.
        flagged: whether the command line, rather than a file, names the objective.
    """
    options = config.search
    if options.objective in {"knn", "linear"}:
        objective = finetune.HeldOutAccuracy(
            cast("Literal['knn', 'linear']", options.objective), options.held_out, options.images,
            config.seed, config.efficiency.num_workers, config.efficiency.device,
        )  # fmt: skip
        objective.check(config.data, config.model.channels)
        return objective
    if not flagged:
        raise UserError(
            f"search.objective {options.objective} names code, which a file may not: give it "
            "on the command line"
        )
    return _find_function(options.objective, "search.objective")


def _find_function(name: str, key: str) -> Callable[[Path], float]:
    """Import `package.module:function`, from a package or from the current folder."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key} {name} is not found: {error}") from None
    if not callable(found):
        raise UserError(f"{key} {name} is not a function")
    return found
