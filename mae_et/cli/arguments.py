"""What the words of a command line mean: the config of a command, checked.

A config of what is downstream (`finetune`) is looked up where a command needs it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mae_et.config.files import add_config_arguments, find_config, parse_config, plain
from mae_et.config.schema import SOURCE_KEYS, PretrainConfig
from mae_et.config.untrusted import unknown_keys
from mae_et.errors import UserError

Arguments = list[str]


def config_of(command: str, arguments: Arguments) -> Any:
    """Return what the arguments of a command mean, for commands whose arguments are a config.

    Raises:
        UserError: they mean nothing.
    """
    import finetune
    from mae_et.config.commands import PrepareConfig
    from mae_et.monitoring.compare import CompareConfig
    from mae_et.search import SearchConfig

    kinds: dict[str, type[Any]] = {
        "pretrain": PretrainConfig,
        "finetune": finetune.ClassifierConfig,
        "supervised": finetune.ClassifierConfig,
        "knn": finetune.ProbeConfig,
        "linear-probe": finetune.ProbeConfig,
        "evaluate": finetune.EvaluateConfig,
        "compare": CompareConfig,
        "prepare": PrepareConfig,
        "search": SearchConfig,
        "dynamics": finetune.DynamicsConfig,
    }
    kind = kinds[command]
    try:
        if kind is finetune.ClassifierConfig:
            return _classifier_config(command, kind, arguments)
        if kind is CompareConfig:
            arguments = _runs_as_flag(arguments)
        return parse_config(parser_of(command, kind), kind, arguments)[0]
    except UserError:
        _refuse_config_of_another(command, kinds, arguments)
        raise


def on_top_of_its_data(
    command: str, kind: type[Any], stored: Callable[[Path], Any], arguments: Arguments
) -> Any:
    """Return a config whose data keys lie on top of those that its checkpoint was trained with."""
    parser = parser_of(command, kind)
    given, _ = parse_config(parser, kind, arguments)
    run = None if given.data is None else stored(given.checkpoint)
    if run is None:
        return given
    parser.set_defaults({"data": plain(run.data)})
    config, _ = parse_config(parser, kind, arguments)
    data = config.data or run.data
    if data.source != run.data.source and data.root == run.data.root:
        data = replace(data, root=None)  # the root of the data that were not asked for
    return replace(config, data=data)


def parser_of(command: str, kind: type[Any]) -> ArgumentParser:
    """Return the parser of a command whose keys are those of a config."""
    parser = ArgumentParser(
        prog=f"mae-et {command}", exit_on_error=False, description=(kind.__doc__ or "").strip()
    )
    add_config_arguments(parser, kind)
    return parser


def _classifier_config(command: str, kind: type[Any], arguments: Arguments) -> Any:
    """Return a classifier's config; fine-tuning without data takes those of its checkpoint."""
    from mae_et.checkpoints.load import stored_config

    pattern = r"^--checkpoint(?==|$)"  # what every other command calls it
    arguments = [re.sub(pattern, "--model.checkpoint", word) for word in arguments]
    parser = parser_of(command, kind)
    parser.description = "--checkpoint PATH is short for --model.checkpoint PATH."
    config, _ = parse_config(parser, kind, arguments)
    start = config.model.checkpoint
    given = config.data.name or config.data.root or config.model.backbone
    if command != "finetune" or given or start is None or not start.exists():
        return config
    run = stored_config(start)
    if run is None:
        return config
    data = plain(run.data) | {"name": run.data.source}
    parser.set_defaults({f"data.{key}": data[key] for key in SOURCE_KEYS})
    return parse_config(parser, kind, arguments)[0]


def _runs_as_flag(arguments: Arguments) -> Arguments:
    """Put run folders that are given without a flag behind --runs."""
    runs, others = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            runs.append(word)
            continue
        others.append(word)
        if word.startswith("--") and "=" not in word:
            others += [value for value in [next(words, None)] if value is not None]
    return [*([f"--runs={json.dumps(runs)}"] if runs else []), *others]


def _refuse_config_of_another(
    command: str, kinds: dict[str, type[Any]], arguments: Arguments
) -> None:
    """Say of a file that it is a config of another command, if that is what is wrong.

    Raises:
        UserError: it is.
    """
    flags = zip(arguments, [*arguments[1:], ""], strict=False)
    names = [after if word == "--config" else word.removeprefix("--config=")
             for word, after in flags if word.partition("=")[0] == "--config"]  # fmt: skip
    for name in names:
        try:
            path = find_config(name)
            text = path.read_text(encoding="utf-8")
            if not unknown_keys(text, kinds[command]):
                continue
            others = [other for other, kind in kinds.items() if not unknown_keys(text, kind)]
        except Exception:  # no file, or no YAML: the sentence that there is says so
            return
        if others:
            other = path.parent.name if path.parent.name in others else others[0]
            raise UserError(f"{path} is a config of mae-et {other}, not of mae-et {command}")
