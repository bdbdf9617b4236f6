"""`python -m mae_et`, for launchers that start modules: torchrun -m mae_et pretrain ..."""

import sys

from mae_et.cli import main

sys.exit(main())
