"""Keep each rank's last NCCL collectives, as evidence of a hang (PyTorch's flight recorder).

They are dumped with the stacks that called them: by PyTorch where NCCL reports an error or times
out, and by the watchdog, whose timeout is shorter. `torchfrtrace` compares the dumps of ranks.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mae_et.runtime.console import say
from mae_et.runtime.watchdog import on_hang

PREFIX = "nccl_trace_rank_"
ENTRIES = "2000"  # the default of recent versions of PyTorch; 2.7 to 2.9 record nothing by default
# Each variable's name since PyTorch 2.8, which warns of the other, and before.
_ENTRIES = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"
_FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_chosen: dict[str, str] = {}
"""Variables set here, which a later run of this process may set again."""


def record_collectives(folder: Path) -> None:
    """Record collectives, to be dumped to a folder; call this before joining the ranks.

    What the environment sets is kept.
    """
    _set_default(_ENTRIES, ENTRIES)
    _set_default(_FILE, str(folder.absolute() / PREFIX))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    on_hang(_dump)


def _set_default(names: tuple[str, str], value: str) -> None:
    if all(os.environ.get(name) == _chosen.get(name) for name in names):
        name = names[torch.__version__ < "2.8"]
        os.environ[name] = _chosen[name] = value


def _dump() -> None:
    """Write this rank's collectives where PyTorch would."""
    library: Any = torch._C._distributed_c10d
    if not dist.is_initialized() or not hasattr(library, "_dump_nccl_trace"):
        return
    prefix = next(os.environ[name] for name in _FILE if name in os.environ)
    path = Path(f"{prefix}{dist.get_rank()}")
    temporary = path.with_name(f".{path.name}.tmp")
    trace: bytes = library._dump_nccl_trace()
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(trace)
        temporary.replace(path)
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}")
    else:
        say(f"the last NCCL collectives of this rank are in {path} (compare: torchfrtrace)")
