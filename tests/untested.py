"""List the public functions that no test runs: `make coverage` calls it with coverage's JSON.

A function is public where neither its own name nor that of a class or function around it begins
with an underscore. Exit status 1 where there is one.
"""

import json
import sys
from pathlib import Path


def untested(report: Path) -> list[str]:
    """Return `file: name` of each public function that was never executed."""
    found = []
    for file, about in json.loads(report.read_text())["files"].items():
        for name, function in about["functions"].items():
            private = not name or any(part.startswith("_") for part in name.split("."))
            has_code = function["summary"]["num_statements"] > 0
            if not private and has_code and not function["executed_lines"]:
                found.append(f"{file}: {name}")
    return sorted(found)


if __name__ == "__main__":
    names = untested(Path(sys.argv[1]))
    print("\n".join(names) or "every public function is run by a test")
    sys.exit(bool(names))
