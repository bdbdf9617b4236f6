"""`make audit` and `make coverage` report what their tools found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HOLE = {"id": "X-1", "fix_versions": ["2"]}


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 packages, 0 known holes"),
        ([{"name": "a", "version": "1", "vulns": [HOLE]}], 1, "a 1: X-1, fixed in 2"),
        ([{"name": "a", "skip_reason": "unknown"}], 75, "not audited"),
        (None, 75, "not audited: pip-audit reached no list of holes"),
    ],
)
def test_audit_distinguishes_no_vulnerabilities_from_no_answer(
    found, status, said, tmp_path: Path
) -> None:
    report = f"open(out, 'w').write({json.dumps(json.dumps({'dependencies': found}))})"
    failing = "print('ERROR: no network', file=sys.stderr)"
    (tmp_path / "pip_audit.py").write_text(
        "import sys\nout = sys.argv[-1].partition('=')[2]\n"
        f"{failing if found is None else report}\nsys.exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, TESTS / "audit.py"], capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == status
    assert said in done.stdout + done.stderr


def test_untested_lists_public_functions_that_never_run(tmp_path: Path) -> None:
    functions = {
        "run": ([1], 1), "left": ([], 2), "_own": ([], 2), "Class.left": ([], 1),
        "_Class.left": ([], 1), "Class.__len__": ([], 1), "": ([], 3), "stub": ([], 0),
    }  # fmt: skip
    about = {
        name: {"executed_lines": lines, "summary": {"num_statements": count}}
        for name, (lines, count) in functions.items()
    }
    (tmp_path / "r.json").write_text(json.dumps({"files": {"m.py": {"functions": about}}}))
    done = subprocess.run(
        [sys.executable, TESTS / "untested.py", tmp_path / "r.json"], capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:-1] == ["m.py: Class.left", "m.py: left"]
    assert done.returncode == 1
