"""One table of several runs: where their configs differ, and what they reached."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mae_et.atomic import write_text_atomically
from mae_et.errors import UserError
from mae_et.plain_files import read_mapping, read_text

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
    """Run folders."""
    output: Path | None = None
    """Markdown file for the table; it is printed alone by default."""


def compare(config: CompareConfig) -> str:
    """Return a Markdown table of runs: a row for each, unfinished ones with what they have.

    Raises:
        UserError: a folder is none.
    """
    rows = [_row(folder) for folder in config.runs]
    settings = sorted({key for _, settings, _ in rows for key in settings})
    varied = [key for key in settings if len({json.dumps(row.get(key)) for _, row, _ in rows}) > 1]
    figures = list(dict.fromkeys(key for _, _, found in rows for key in found))
    head = ["run", *varied, *figures]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for folder, row, found in rows:
        cells = [_cell(row.get(key)) for key in varied] + [_cell(found.get(k)) for k in figures]
        lines.append("| " + " | ".join([folder.name, *cells]) + " |")
    table = "\n".join(lines)
    if config.output is not None:
        write_text_atomically(config.output, table + "\n")
    return table


def _row(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return a folder, its settings by their keys, and its figures."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    written = folder / "config.yaml"
    settings = _settings(written) if written.exists() else {}
    found = _figures(folder, "")
    for kind in INNER:
        found |= _figures(folder / kind, "" if kind in {"knn", "linear-probe"} else f"{kind} ")
    return folder, _flat(settings), found


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(read_text(path))
        json.dumps(settings)  # which refuses what holds itself
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no config: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no config: it holds a {type(settings).__name__}")
    return {str(key): value for key, value in settings.items()}


def _figures(folder: Path, prefix: str) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.exists():
        return {}
    results = read_mapping(path)
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
    return f"{value:.6g}" if isinstance(value, float) else str(value)
