"""Commands to run before training: plan a curriculum, or search for one."""

import contextlib
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import finetune
from finetune.config import ClassifierConfig
from finetune.plan_config import ClassifierPlanConfig
from mae_et.cli.arguments import Arguments, parse
from mae_et.cli.command import Command
from mae_et.cli.output import print_json
from mae_et.cli.slurm_jobs import command_line
from mae_et.config.commands import PlanConfig
from mae_et.config.key_checks import unknown_keys
from mae_et.config.schema import PretrainConfig
from mae_et.config.shipped import find_config
from mae_et.config.words import join_config_flags
from mae_et.errors import UserError
from mae_et.io.plain_files import read_text
from mae_et.runtime.console import say
from mae_et.search.config import SearchConfig

IMAGENET_1K = 1_281_167


def plan_config(command: Command, arguments: Arguments) -> PlanConfig | ClassifierPlanConfig:
    """Parse the keys of a pre-training or, if the words are of one, of a classifier."""
    if _is_of_classifier(arguments):
        command = replace(command, config=ClassifierPlanConfig)
    config: PlanConfig | ClassifierPlanConfig = parse(command, arguments)
    return config


def _is_of_classifier(arguments: Arguments) -> bool:
    for word in join_config_flags(arguments):
        if re.match(r"--(model\.)?(checkpoint|backbone)\b", word):
            return True
        with contextlib.suppress(Exception):  # the parser reports a missing or damaged file
            text = read_text(find_config(word.partition("--config=")[2]))
            if unknown_keys(text, PlanConfig) and not unknown_keys(text, ClassifierPlanConfig):
                return True
    return False


def plan(config: PlanConfig | ClassifierPlanConfig) -> None:
    """Print a curriculum's stages, steps, images, FLOPs and cost."""
    from mae_et.curriculum.speeds import throughput_from_options
    from mae_et.curriculum.table import COMPUTE_UNITS, plan_table, summarise
    from mae_et.curriculum.throughput import throughput_table
    from mae_et.training.plan import plan_new_run

    images, against = config.images or count_images(config), config.against_epochs
    if isinstance(config, ClassifierPlanConfig):
        from finetune.training.classifier import plan_classifier

        resolved = plan_classifier(config, images)
        against = against or resolved.images / resolved.dataset_size  # not MAE's
    else:
        resolved = plan_new_run(config, images)
    unit = COMPUTE_UNITS[config.curriculum.cost]
    summary = summarise(resolved, unit, against)
    speeds = throughput_from_options(resolved, config, config.data.replay)
    if config.json:
        print_json(summary | ({} if speeds is None else {"throughput": speeds}))
        return
    print(plan_table(summary))
    if speeds is not None:
        print("\n" + throughput_table(speeds))


def count_images(config: PretrainConfig | ClassifierConfig) -> int:
    """Count the images of an epoch: those of the dataset, or ImageNet-1K's without one."""
    if config.data.source == "folder" and config.data.root is None:
        say("no data.root: planned for the images of ImageNet-1K")
        return IMAGENET_1K
    from mae_et.data.datasets import open_dataset

    return len(open_dataset(config.data, "train", config.model.channels))


def search_config(command: Command, arguments: Arguments) -> SearchConfig:
    """Parse the keys of a search, whose objective may be code only if the command line names it."""
    config: SearchConfig = parse(command, arguments)
    objective = config.search.objective
    if ":" in objective and not any(word.startswith("--search.objective") for word in arguments):
        raise UserError(
            f"search.objective {objective} names code, which a config may not: give it on the "
            "command line"
        )
    return config


def search(config: SearchConfig) -> dict[str, Any]:
    """Search a curriculum for a dataset and a model; resumes."""
    options, objective = config.search, _objective(config)
    from mae_et.search.driver import search
    from mae_et.search.trials import Runner, run_here

    runner: Runner = run_here
    if options.cluster is not None:
        from slurm.trials import ClusterRunner

        runner = ClusterRunner(command_line(), options.cluster, config.output.dir)
    results = search(config, objective, runner, parallel=options.cluster is not None)
    stages = ", ".join(str(bandwidth) for bandwidth in results["bandwidths"])
    say(
        f"found {stages}: {options.objective} {results['value']:.2f}; train with: "
        f"mae-et pretrain --config {results['curriculum']}"
    )
    return results


def _objective(config: SearchConfig) -> Callable[[Path], float]:
    """Return the function that scores the run folder of a trial."""
    options = config.search
    if ":" in options.objective:
        return _find_function(options.objective)
    objective = finetune.HeldOutAccuracy(
        cast("Literal['knn', 'linear']", options.objective), options.held_out, options.images,
        config.seed, config.efficiency.num_workers, config.efficiency.device,
    )  # fmt: skip
    objective.check(config.data, config.model.channels)
    return objective


def _find_function(name: str) -> Callable[[Path], float]:
    """Import `package.module:function` from a package or the current folder."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"search.objective {name} is not found: {error}") from error
    if not callable(found):
        raise UserError(f"search.objective {name} is not a function")
    return found
