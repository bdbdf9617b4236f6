"""Ask pip-audit whether what is installed has known holes: `make audit`.

Exit status: 0 where none is known, 1 where one is, 75 (try again later) where nobody could be
asked, as on a machine without network: that is no clean bill.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

UNREACHED = 75


def main() -> int:
    """Run pip-audit, and say in one sentence what it found."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off",
                   "--timeout=15", "--format=json", f"--output={report}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # Its status is 1 for a hole as for a network that is not there; a report tells them apart.
        content = report.read_text() if report.is_file() else ""
    if not content:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        reason = last.partition("(")[0].rpartition(":")[2].strip() or "it said nothing"
        print(f"audit: not audited: pip-audit reached no list of holes ({reason})", file=sys.stderr)
        return UNREACHED
    packages = json.loads(content)["dependencies"]
    # What is on no index, such as a build of torch of one's own, is not in the lists either.
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
    for package, hole in holes:
        fixed = ", ".join(hole["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {hole['id']}, fixed in {fixed}")
    looked_up = len(packages) - len(skipped)
    if not looked_up:
        print("audit: not audited: the list that was reached knows no package", file=sys.stderr)
        return UNREACHED
    left = f"; {len(skipped)} not looked up: {', '.join(skipped[:5])}" if skipped else ""
    print(f"audit: {looked_up} packages, {len(holes)} known holes{left}")
    return int(bool(holes))


if __name__ == "__main__":
    sys.exit(main())
