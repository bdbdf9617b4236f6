"""The log of a search: `trials.jsonl`, one JSON line per score, append-only."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class TrialLog:
    """Append-only JSON lines; each record is on disk before `append` returns.

    Args:
        path: the file; created by the first record.
    """

    def __init__(self, path: Path):
        self.path = path
        truncate_partial_line(path)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: list[Record] = [json.loads(line) for line in lines]

    def append(self, record: Record) -> None:
        """Append a record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def truncate_partial_line(path: Path) -> None:
    """Remove the partial last line that a killed writer left in a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            file.truncate(complete)
