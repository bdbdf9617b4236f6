"""The commands of `mae-et`, in the order of `mae-et --help`: to add one, add a row."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from finetune.config import ClassifierConfig
from finetune.feature_config import EmbedConfig, FeatureMapConfig, PredictConfig
from finetune.scoring_config import DynamicsConfig, EvaluateConfig, ProbeConfig
from mae_et.cli import bench, files, planning, scores, slurm_jobs, training
from mae_et.cli.arguments import Arguments, parse, parse_over_data
from mae_et.cli.command import Command
from mae_et.cli.completion import completion
from mae_et.cli.configs import configs
from mae_et.config.commands import (
    CompareConfig,
    ExportConfig,
    NodeConfig,
    PlanConfig,
    PrepareConfig,
    PreviewConfig,
    ReconstructConfig,
    ReportConfig,
)
from mae_et.config.schema import PretrainConfig
from mae_et.config.suggestions import suggest
from mae_et.errors import UserError
from mae_et.search.config import SearchConfig

_UNSAVED = "there was nothing to save, and checkpoints saved before are kept"
_UNSCORED = "scores written before are kept, and the same command starts over"

_training = partial(
    Command, parse=training.config_and_stop, branches=True, trains=True, distributed=True,
    stopped=_UNSAVED,
)  # fmt: skip
_scoring = partial(Command, parse=parse_over_data, first="checkpoint", stopped=_UNSCORED)
_writing_rows = partial(
    Command, parse=parse_over_data, first="checkpoint",
    stopped="saved rows are kept, and the same command resumes",
)  # fmt: skip
_probing = partial(
    _scoring, config=ProbeConfig, repeat=scores.for_each_run,
    stopped="scores and feature_cache files written before are kept; the same command starts over",
)  # fmt: skip

_TABLE = (
    Command("demo", training.demo, PretrainConfig, training.demo_config, stopped=_UNSAVED),
    Command("configs", configs),
    Command("plan", planning.plan, PlanConfig, planning.plan_config, branches=True),
    Command("preview", files.preview, PreviewConfig, files.preview_config, branches=True),
    Command(
        "preview --features", files.preview_features, FeatureMapConfig, parse_over_data,
        first="checkpoint",
    ),
    _training("pretrain", training.pretrain, PretrainConfig, first="run"),
    _training("finetune", training.finetune, ClassifierConfig, first="checkpoint"),
    _training("supervised", training.supervised, ClassifierConfig, first="run"),
    _scoring("evaluate", scores.evaluate, EvaluateConfig, distributed=True),
    _probing("knn", scores.knn, keys_of_others={"epochs": "linear-probe"}),
    _probing(
        "linear-probe", scores.linear_probe,
        keys_of_others={"neighbours": "knn", "temperature": "knn"},
    ),
    _writing_rows("embed", files.embed, EmbedConfig),
    _writing_rows("predict", files.predict, PredictConfig),
    Command("reconstruct", files.reconstruct, ReconstructConfig, first="checkpoint"),
    Command("export", files.export, ExportConfig, first="checkpoint"),
    Command(
        "prepare", files.prepare, PrepareConfig,
        stopped="complete shards are kept, and the same command resumes",
    ),
    Command("compare", files.compare, CompareConfig, first="runs"),
    Command("report", files.report, ReportConfig, first="runs"),
    Command(
        "search", planning.search, SearchConfig, planning.search_config,
        stopped="finished trials are kept, and the same command resumes",
    ),
    _scoring(
        "dynamics", scores.dynamics, DynamicsConfig,
        stopped="checkpoints scored before are kept, and the same command resumes",
    ),
    Command("bench", bench.bench, stopped="files written before are kept"),
    Command("bench node", bench.bench_node, NodeConfig),
    Command("submit", slurm_jobs.submit, stopped="no chain of jobs is submitted in part"),
    Command("status", slurm_jobs.status, stopped="the runs continue"),
    Command("completion", completion),
)  # fmt: skip

COMMANDS = {command.name: command for command in _TABLE if " " not in command.name}
SUBCOMMANDS = {command.name: command for command in _TABLE if " " in command.name}
"""Those of two words."""


def find(words: Sequence[str]) -> tuple[Command, Arguments]:
    """Return the command that the words of a command line start with, and its arguments."""
    name, *rest = words
    second, equals, value = rest[0].partition("=") if rest else ("", "", "")
    if (longer := SUBCOMMANDS.get(f"{name} {second}")) is not None:
        return longer, [value] * bool(equals) + rest[1:]
    if name not in COMMANDS:
        meant = suggest(name, COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}{meant}")
    return COMMANDS[name], rest


def config_of(name: str, arguments: Arguments) -> Any:
    """Return the config of a command, by its name, from its arguments alone."""
    command, rest = find([*name.split(), *arguments])
    if command.config is None:
        raise UserError("only the benchmark node can be submitted: mae-et submit bench node ...")
    return parse(command, rest)
