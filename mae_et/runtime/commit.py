"""The commit that the code is of."""

import subprocess
from pathlib import Path

RECORD = "COMMIT"
"""File in the package's folder that records the commit of a copy, which has no .git."""


def code_commit() -> str | None:
    """Return the commit of the clone, with `+` after it where files are changed.

    For the copy of a SLURM job, that of the clone when it was copied. None without git or a clone.
    """
    package = Path(__file__).parents[1]
    if (package / RECORD).is_file():
        return (package / RECORD).read_text()
    clone = package.parent
    if not (clone / ".git").exists():
        return None
    try:
        commit = _git(clone, "rev-parse", "HEAD").strip()
        return commit + "+" * bool(_git(clone, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):  # no git, or a clone of another user
        return None


def _git(clone: Path, *words: str) -> str:
    command = ["git", "-C", str(clone), *words]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
