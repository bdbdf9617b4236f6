"""What a search has found out, a line of JSON for each fact, never changed once written."""

import json
import os
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


class Journal:
    """An append-only file of facts, each on disk before `note` returns.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        drop_half_line(path)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.facts: list[Fact] = [json.loads(line) for line in lines]

    def note(self, fact: Fact) -> None:
        """Append a fact."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fact) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.facts.append(fact)


def drop_half_line(path: Path) -> None:
    """Cut off what a writer that was killed left after the last whole line of a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
