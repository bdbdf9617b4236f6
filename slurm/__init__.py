"""Launch on SLURM through submitit: submit, resume after preemption, report status.

Only this package imports submitit.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
