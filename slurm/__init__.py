"""Launch on SLURM through submitit: submit, go on after preemption, and tell what is going on.

Only this package imports submitit.
"""

from slurm.config import ClusterConfig
from slurm.run_status import status
from slurm.submission import submit

__all__ = ["ClusterConfig", "status", "submit"]
