"""The log of a search: `trials.jsonl`, one JSON line per score, append-only."""

import json
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.io.plain_files import append_line, no_follow, read_bytes
from mae_et.io.seals import seal, unseal

Record = dict[str, Any]


class TrialLog:
    """Append-only JSON lines; each record is on disk before `append` returns.

    Raises:
        UserError: a record does not match its checksum.
    """

    def __init__(self, path: Path):
        self.path = path
        truncate_partial_line(path)
        lines = read_bytes(path).splitlines() if path.exists() else []
        self.records: list[Record] = []
        for number, line in enumerate(lines, 1):
            try:
                self.records.append(unseal(json.loads(line)))
            except (ValueError, RecursionError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path} is damaged at line {number} of {len(lines)} ({error}): the trials "
                    f"before it can be kept (head -n {number - 1}), those after it run again"
                ) from None

    def append(self, record: Record) -> None:
        """Append a record."""
        append_line(self.path, json.dumps(seal(record)) + "\n")
        self.records.append(record)


def truncate_partial_line(path: Path) -> None:
    """Remove the partial last line that a killed writer left in a file."""
    if not path.exists():
        return
    with open(path, "rb+", opener=no_follow) as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            file.truncate(complete)
