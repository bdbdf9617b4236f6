"""What commands print: results as one line of JSON, hints for people on stderr."""

import json
import sys
from pathlib import Path
from typing import Any

from mae_et.runtime.console import is_main


def print_json(results: dict[str, Any]) -> None:
    """Print results as one line of JSON, from rank 0 only."""
    if is_main():
        print(json.dumps(results), flush=True)


def print_run(folder: Path, further: dict[str, Any]) -> None:
    """Print the results of a finished run, and how to look at its curves; from rank 0 only."""
    if is_main():
        results = json.loads((folder / "results.json").read_text())
        print(f"mae-et: curves: tensorboard --logdir {folder}", file=sys.stderr)
        print_json({"run": str(folder)} | results | further)
