"""Weights, gradients and optimizer states in shards over all processes (FSDP2), for large models.

Each transformer block is gathered when it is needed and let go afterwards. On disk nothing of it is
seen: states are gathered to what one process would have written, so a run goes on with or without.

Autocast computes in half precision as without sharding, and master weights stay float32: no
MixedPrecisionPolicy is needed.
"""

import warnings
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mae_et.errors import UserError
from mae_et.models.decoders import CrossBlock
from mae_et.runtime.distributed import DistributedContext

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_GIVEN = StateDictOptions(full_state_dict=True)


def shard(model: nn.Module, world: DistributedContext) -> None:
    """Shard a model in place, block by block, and then what is outside of blocks.

    What lies on the CPU is moved to the world's device so, never all of it at once. An optimizer
    over its parameters must be built afterwards.

    Raises:
        UserError: it has no transformer blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block | CrossBlock)]
    if not blocks:
        raise UserError("efficiency.sharding is of networks of transformer blocks; this has none")
    # The prediction is a view of the decoder's output. Only the loss is gone back from, and nothing
    # is added to it in place, which is what torch warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return a sharded model's state on the CPU of the main process; every process must ask."""
    return get_model_state_dict(model, options=_GATHERED)


def full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what `state_dict` of an optimizer without sharding does; every process must ask.

    States are named by numbers in the order of the groups; only the main process gets them.
    """
    if not optimizer.state:  # before a first step; torch would take one, of zeros, and count it
        return optimizer.state_dict()
    named: Any = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
    if not named:
        return {}
    numbers = _numbers(model, optimizer)
    groups = [
        group | {"params": [numbers[name] for name in group["params"]]}
        for group in named["param_groups"]
    ]
    state = {numbers[name]: state for name, state in named["state"].items()}
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def load_full_state_dict(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load into a sharded model what a model in one piece saved; each process has all of it."""
    set_model_state_dict(model, weights, options=_GIVEN)


def load_full_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    """Load into an optimizer of a sharded model what one without sharding saved."""
    if not saved["state"]:
        optimizer.load_state_dict(saved)
        return
    names = {number: name for name, number in _numbers(model, optimizer).items()}
    groups = [
        group | {"params": [names[number] for number in group["params"]]}
        for group in saved["param_groups"]
    ]
    state = {names[number]: dict(state) for number, state in saved["state"].items()}
    given: Any = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, given, options=_GIVEN)
    for group, mine in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {key: value for key, value in mine.items() if key != "params"}  # tuples as such


def _numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return each parameter's number in its optimizer's `state_dict`, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = (p for group in optimizer.param_groups for p in group["params"])
    return {names[id(parameter)]: number for number, parameter in enumerate(ordered)}
