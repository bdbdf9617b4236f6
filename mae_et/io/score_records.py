"""Keep the scores in a folder: one record for each combination of data, settings and weights.

`results.json` is the latest record. Each also has a file of its own, named after what it was
computed from, so that processes that score at the same time do not replace each other's.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.metrics_file import with_current_names
from mae_et.io.plain_files import read_mapping

RESULTS = "results.json"
ORIGIN = frozenset({"version", "checkpoint"})
"""Entries of a record's provenance that do not decide its scores."""

Record = dict[str, Any]


def write_record(folder: Path, record: Record) -> int:
    """Write scores to a folder as its latest record, and return how many others it holds.

    A record of the same data, settings and weights is replaced, except for scores that the new one
    lacks.
    """
    with suppress(UserError):  # a damaged file is replaced
        earlier = read_mapping(folder / RESULTS)
        if not _own_file(folder, earlier).exists():  # written by an earlier version
            _write(_own_file(folder, earlier), earlier)
    path = _own_file(folder, record)
    with suppress(UserError):
        record = with_current_names(read_mapping(path)) | record
    _write(path, record)
    _write(folder / RESULTS, record)
    return len(_own_files(folder)) - 1


def read_records(folder: Path) -> list[Record]:
    """Return the records in a folder of scores, the latest first; refuse damaged ones."""
    found = [with_current_names(read_mapping(path)) for path in _own_files(folder)]
    if (folder / RESULTS).exists():
        latest = with_current_names(read_mapping(folder / RESULTS))
        found = [latest, *(record for record in found if record != latest)]
    return found


def deciding(record: Record) -> dict[str, Any]:
    """Return the entries of a record that decide its scores."""
    provenance = record.get("provenance")
    known = provenance if isinstance(provenance, dict) else {}
    entries = {key: record.get(key) for key in ("data", "settings")}
    return entries | {key: value for key, value in known.items() if key not in ORIGIN}


def _own_file(folder: Path, record: Record) -> Path:
    entries = deciding(record)
    data = Path(str(entries["data"]))
    if data.exists():  # otherwise a name, not a folder
        entries["data"] = str(data.resolve())
    text = json.dumps(entries, sort_keys=True)
    return folder / f"results-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.json"


def _own_files(folder: Path) -> list[Path]:
    """Return the files of single records, the newest first."""
    return sorted(folder.glob("results-*.json"), key=lambda path: -path.stat().st_mtime_ns)


def _write(path: Path, record: Record) -> None:
    write_text_atomically(path, json.dumps(record, indent=1))
