"""`python -m mae_et`, for launchers that start modules: torchrun -m mae_et pretrain ..."""

import sys
from importlib.util import find_spec
from pathlib import Path

from mae_et.errors import Stopped
from mae_et.runtime.signals import stop_signals


def hidden_package() -> str | None:
    """Return which of our packages a file in the current folder hides, without importing it.

    With -m, Python searches the current folder first.
    """
    ours = Path(__file__).parents[1]
    for package in ("finetune", "slurm"):
        found = find_spec(package)
        if found is None or Path(found.origin or "") != ours / package / "__init__.py":
            return package
    return None


def main() -> int:
    """Run the command line, with signals handled before anything large is imported."""
    try:
        with stop_signals():
            from mae_et.cli.main import main as run

            return run()
    except Stopped as error:
        print(f"mae-et: {error}", file=sys.stderr)
        return 128 + error.signal


if __name__ == "__main__":
    if (package := hidden_package()) is not None:
        print(
            f"mae-et: a file or folder here is called {package} and hides the package {package} of "
            "mae-et: set PYTHONSAFEPATH=1, or start mae-et instead of python -m mae_et",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(main())
