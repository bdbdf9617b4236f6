"""`--help` describes the keys that most runs set; `--help all` every key of a command."""

import argparse
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from finetune.config import ClassifierConfig
from mae_et.config.commands import NodeConfig, PlanConfig, PreviewConfig
from mae_et.config.schema import PretrainConfig
from mae_et.search.config import SearchConfig

MOST_KEYS = 30
"""Commands with at most this many keys describe all of them."""

_SHARED = (
    "config", "data.root", "data.name", "output.dir", "seed", "curriculum.preset",
    "curriculum.epochs", "crop.method", "optim.batch_size", "optim.base_lr", "optim.weight_decay",
    "efficiency.device", "efficiency.precision", "efficiency.compile", "efficiency.micro_batch",
    "efficiency.num_workers",
)  # fmt: skip
_PRETRAIN = (
    *_SHARED, "model.encoder", "model.image_size", "model.target", "model.mask_ratio",
    "init.weights", "probe.every",
)  # fmt: skip
COMMON_KEYS: dict[type[Any], Sequence[str]] = {
    PretrainConfig: _PRETRAIN,
    PlanConfig: (
        *_PRETRAIN, "json", "images", "against_epochs", "throughput", "loader", "gpus",
        "cores_per_gpu",
    ),
    PreviewConfig: (*_PRETRAIN, "save"),
    NodeConfig: (*_PRETRAIN, "json", "save", "seconds", "images"),
    SearchConfig: (*_PRETRAIN, "search.strategy", "search.objective", "search.stages"),
    ClassifierConfig: (
        *_SHARED, "model.checkpoint", "model.backbone", "model.image_size", "model.probe",
        "optim.layer_decay", "output.evaluate_every",
    ),
}  # fmt: skip


def help_requested(arguments: Sequence[str]) -> bool:
    """Return whether the words of a command ask for its help."""
    return any(word in {"-h", "--help"} for word in arguments)


def help_text(
    command: str, parser: ArgumentParser, kind: type[Any], arguments: Sequence[str]
) -> str:
    """Return the help of a command: of its common keys, or of all of them for `--help all`.

    The parser's other descriptions are hidden.
    """
    parser.usage = f"mae-et {command} [--config FILE_OR_NAME ...] [--KEY VALUE ...]"
    for group in parser._action_groups:
        if parser.description and parser.description.startswith(group.title or "-"):
            group.title = "keys"  # the title would repeat the description
    keys = [action for action in parser._actions if action.dest in _leaves(parser)]
    common = COMMON_KEYS.get(kind)
    if common is None or len(keys) <= MOST_KEYS or "all" in arguments:
        return parser.format_help()
    for action in parser._actions:
        if action.dest not in common:
            action.help = argparse.SUPPRESS
    parser.epilog = f"{len(common)} of {len(keys)} keys; the others: mae-et {command} --help all"
    return parser.format_help()


def _leaves(parser: ArgumentParser) -> set[str]:
    """Return the keys that have values, without sections and --help."""
    names = {action.dest for action in parser._actions if action.option_strings}
    sections = {name.rpartition(".")[0] for name in names}
    return names - sections - {"help", "print_config"}
