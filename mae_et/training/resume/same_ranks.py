"""Check what must be equal on all ranks of a run.

Settings, code and libraries are compared as soon as the ranks have joined (`check_same_command`),
data once they are listed (`same_data.check_data`), plan and weights before training
(`check_same_start`).
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from mae_et.config.files import flat_keys, plain
from mae_et.config.keys import marked_keys
from mae_et.curriculum.plan import Plan
from mae_et.runtime.agreement import check_ranks_agree, code_version, tensor_digests
from mae_et.runtime.distributed import DistributedContext

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_same_command(config: "DataclassInstance", world: DistributedContext) -> None:
    """Refuse ranks with another config, code, libraries or device type (`check_ranks_agree`)."""
    if world.size == 1:
        return
    settings = flat_keys(plain(config)).items()
    # Paths and cores may differ between nodes; data and weights themselves are compared.
    may_differ = marked_keys(type(config), "rank")
    facts = {key: value for key, value in settings if key not in may_differ}
    facts |= {"the device": world.device.type, **code_version(type(config).__module__)}
    check_ranks_agree(facts, world)


def check_same_start(model: nn.Module | None, plan: Plan | None, world: DistributedContext) -> None:
    """Refuse ranks with another plan or other initial weights (`check_ranks_agree`).

    DistributedDataParallel would silently replace the weights by those of rank 0. The model is
    neither sharded nor wrapped; None if its weights come from a checkpoint, which is the same on
    every rank (`share_checkpoint`).
    """
    if world.size == 1:
        return
    facts: dict[str, Any] = {} if plan is None else {"the plan": plan.to_dict()}
    digests = {} if model is None else tensor_digests(model.state_dict())
    facts |= {f"the checksum of {name}": digest for name, digest in digests.items()}
    check_ranks_agree(facts, world)
