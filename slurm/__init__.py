"""Launch on SLURM through submitit: submit, resume after preemption, report status.

Only this package imports submitit.
"""

from typing import TYPE_CHECKING

from mae_et.lazy import lazy_exports

if TYPE_CHECKING:
    from slurm.config import ClusterConfig as ClusterConfig
    from slurm.run_status import status as status
    from slurm.submission import submit as submit
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "slurm.config": ["ClusterConfig"],
            "slurm.run_status": ["status"],
            "slurm.submission": ["submit"],
        },
    )
