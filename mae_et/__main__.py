"""`python -m mae_et`, for launchers that start modules: torchrun -m mae_et pretrain ..."""

import sys
from contextlib import suppress
from pathlib import Path

# With -m Python looks into the current folder first, where a user's finetune.py would pass for our
# package. A checkout is that folder and the place of this file at once, and stays.
with suppress(OSError):  # the folder may be gone
    here = Path.cwd()
    if Path(__file__).resolve().parent.parent != here.resolve():
        sys.path[:] = [path for path in sys.path if path not in {"", str(here)}]

from mae_et.cli.main import main

sys.exit(main())
