"""Shard weights, gradients and optimizer states over ranks (FSDP2), for large models.

Each transformer block is gathered when needed and freed afterwards. Checkpoints hold full tensors,
as written without sharding, so a run can resume with or without it.

They are sharded over all ranks, or over those of a node (HSDP): then gathering a block stays within
a node, and nodes exchange the sums of their gradients once per step.

Under bf16 autocast, blocks are gathered in bf16, which halves the traffic, and gradients are summed
over ranks in float32. Autocast also uses their matrices in bf16 without sharding; here the weights
of their norms are rounded as well. Master weights, activations between blocks and everything
outside blocks stay in float32.
"""

import os
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mae_et.errors import UserError, require
from mae_et.runtime.distributed import DistributedContext, all_ranks_equal
from mae_et.training.efficiency.compile import transformer_blocks

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_GIVEN = StateDictOptions(full_state_dict=True)
_SENT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(
    model: nn.Module,
    world: DistributedContext,
    dtype: torch.dtype | None = None,
    within_nodes: bool = False,
) -> None:
    """Shard a model in place, block by block, then the rest.

    A model on the CPU moves to the device block by block, never all at once. Build the optimizer
    afterwards. Weights are gathered in `dtype`, that of autocast. With `within_nodes`, they are
    sharded over the ranks of each node, and every node keeps a copy.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError("efficiency.sharding needs transformer blocks; this model has none")
    # The prediction is a view of the decoder's output. torch warns against in-place changes to such
    # a view; there are none, and only the loss is differentiated.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = _mesh(world, ranks_per_node(world) if within_nodes else world.size)
    # Autocast casts as needed; casting the inputs of blocks would round the residual stream.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for norm in block.modules() if dtype else ():
            if isinstance(norm, nn.LayerNorm):
                norm.forward = partial(_float32_layer_norm, norm)  # type: ignore[method-assign]
    fully_shard(model, mesh=mesh)


def ranks_per_node(world: DistributedContext) -> int:
    """Return the number of ranks on each node, from LOCAL_WORLD_SIZE; every rank must call this."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    require(
        all_ranks_equal(here, world) and world.size % here == 0,
        f"efficiency.sharding hybrid needs as many ranks on every node; LOCAL_WORLD_SIZE is {here} "
        f"here, of {world.size} ranks",
    )
    return here


def _mesh(world: DistributedContext, shards: int) -> DeviceMesh:
    """Return the mesh of all ranks; where they exceed the number of shards, [copies, shards]."""
    if shards == world.size:
        return init_device_mesh(world.device.type, (shards,))
    shape, names = (world.size // shards, shards), ("copy", "shard")
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def _float32_layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalise in float32 with bf16 weights, which autocast on a CPU does not do."""
    weight, bias = (part if part is None else part.float() for part in (norm.weight, norm.bias))
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return a sharded model's full state dict on the main rank's CPU; every rank must call it."""
    return get_model_state_dict(model, options=_GATHERED)


def full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict as if unsharded; every rank must call this.

    Parameters are numbered in the order of the groups. Only the main rank gets the states.
    """
    # Before the first step: torch would take one, with gradients of zero, and count it.
    if not optimizer.state:
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
    """Load a full state dict, present on every rank, into a sharded model."""
    set_model_state_dict(model, weights, options=_GIVEN)


def load_full_optimizer_state_dict(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    on_main: bool = False,
) -> None:
    """Load an unsharded optimizer's state dict into the optimizer of a sharded model.

    Every rank has the state dict; with `on_main`, only the main rank has its tensors, which it
    sends one by one.
    """
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
    set_optimizer_state_dict(model, optimizer, given, options=_SENT if on_main else _GIVEN)
    for group, mine in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {key: value for key, value in mine.items() if key != "params"}  # keeps tuples


def _numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return each parameter's number in its optimizer's `state_dict`, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = (p for group in optimizer.param_groups for p in group["params"])
    return {names[id(parameter)]: number for number, parameter in enumerate(ordered)}
