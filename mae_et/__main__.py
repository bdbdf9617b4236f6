"""`python -m mae_et`, for launchers that start modules: torchrun -m mae_et pretrain ..."""

import sys
from importlib.util import find_spec
from pathlib import Path

from mae_et.errors import Stopped
from mae_et.runtime.signals import stop_signals


def hidden_package() -> str | None:
    """Return the file that hides one of our packages, without importing it.

    Python searches the folders of PYTHONPATH before installed packages and, with -m, the current
    folder before both.
    """
    ours = Path(__file__).parents[1]
    for package in ("finetune", "slurm"):
        found = find_spec(package)
        if found is None or Path(found.origin or "") != ours / package / "__init__.py":
            return package if found is None else found.origin
    return None


def main() -> int:
    """Run the command line, with signals handled before anything large is imported."""
    if (file := hidden_package()) is not None:
        print(
            f"mae-et: {file} hides a package of mae-et with the same name: rename it, remove its "
            "folder from PYTHONPATH, or start mae-et instead of python -m mae_et",
            file=sys.stderr,
        )
        return 2
    try:
        with stop_signals():
            from mae_et.cli.main import main as run

            return run()
    except Stopped as error:
        print(f"mae-et: {error}", file=sys.stderr)
        return 128 + error.signal


if __name__ == "__main__":
    sys.exit(main())
