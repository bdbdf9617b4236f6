"""One table of several runs: where their configs differ, and what they reached."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.plain_files import read_mapping, read_text

# Figures of results.json that tell runs apart, in the order of the columns.
FIGURES = (
    "loss", "top1", "top5", "best_top1", "raw_top1", "knn", "linear", "untrained_knn",
    "untrained_linear", "equivalent_epochs", "images", "training_seconds",
)  # fmt: skip
# Results of what was started from a run lie in folders of their own inside it.
INNER = ("knn", "linear-probe", "finetune", "evaluate")


@dataclass(frozen=True)
class CompareConfig:
    """Put the results of several runs side by side."""

    runs: list[Path]
    """Run folders; also without the flag: compare runs/a runs/b."""
    output: Path | None = None
    """Markdown file for the table; it is printed alone by default."""


def compare(config: CompareConfig) -> str:
    """Return a Markdown table of runs: a row for each, unfinished ones with what they have.

    Raises:
        UserError: a folder is none, or the output cannot be written.
    """
    rows = [(folder, settings_of(folder), figures_of(folder)) for folder in config.runs]
    varied = varied_keys([settings for _, settings, _ in rows])
    figures = list(dict.fromkeys(key for _, _, found in rows for key in found))
    head = ["run", *varied, *figures]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for folder, row, found in rows:
        cells = [_cell(row.get(key)) for key in varied] + [_cell(found.get(k)) for k in figures]
        lines.append("| " + " | ".join([_cell(folder.name), *cells]) + " |")
    table = "\n".join(lines)
    if config.output is not None:
        try:
            write_text_atomically(config.output, table + "\n")
        except OSError as error:
            raise UserError(f"output {config.output} cannot be written: {error.strerror}") from None
    return table


def settings_of(folder: Path) -> dict[str, Any]:
    """Return a run's config by flat keys (`optim.base_lr`), without `output`.

    Raises:
        UserError: there is no such folder, or its config is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    text = read_text(path)
    try:
        # No run writes aliases; a few of them can stand for more than fits in memory.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError
        return _flat(yaml.safe_load(text))
    except (AttributeError, RecursionError, TypeError, ValueError, yaml.YAMLError):
        raise UserError(f"{path} is damaged") from None


def figures_of(folder: Path) -> dict[str, Any]:
    """Return the figures of a run and of what was started from it, as far as they are there.

    Raises:
        UserError: a file of results is damaged.
    """
    found = _figures(folder, "")
    for kind in INNER:
        found |= _figures(folder / kind, "" if kind in {"knn", "linear-probe"} else f"{kind} ")
    return found


def table_of(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; empty where there is no file.

    Raises:
        UserError: it holds no object.
    """
    return read_mapping(path) if path.exists() else {}


def varied_keys(settings: list[dict[str, Any]]) -> list[str]:
    """Return the keys in which configs differ, sorted."""
    keys = sorted({key for each in settings for key in each})
    written = {key: {json.dumps(each.get(key), default=str) for each in settings} for key in keys}
    return [key for key in keys if len(written[key]) > 1]


def _figures(folder: Path, prefix: str) -> dict[str, Any]:
    results = table_of(folder / "results.json")
    return {f"{prefix}{key}": results[key] for key in FIGURES if key in results}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and prefix == "":
            flat |= _flat(value, f"{key}.")
        elif prefix != "output.":
            flat[prefix + key] = value
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")  # which would end the row, or the cell
