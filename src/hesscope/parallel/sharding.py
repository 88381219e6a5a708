"""A model divided among processes by PyTorch's own `fully_shard`, block by block."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hesscope.errors import HesscopeError
from hesscope.models import find_trunk, is_sharded


def fully_shard_model(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Divide a model's weights among the ranks, each block of its trunk by itself and the rest together, in place.

    It is `torch.distributed.fsdp.fully_shard` called on every block and then on the model; a script may as well do that itself,
    or hand over a model that training has divided. Every rank has loaded the whole model before, with the same weights.

    Args:
        mesh: of one dimension, or of two, with names, for hybrid sharding (replicas, shards); all ranks in one dimension by default.

    Raises:
        HesscopeError: no process group, a model without a list of like blocks, or one that is divided already.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise HesscopeError("Expected an initialised process group; call torch.distributed.init_process_group first.")
    if any(is_sharded(p) for p in model.parameters()):
        raise HesscopeError("Expected a model that is not divided yet; this one is, so leave fully_shard_model out.")
    trunk = find_trunk(model)
    if trunk is None:
        raise HesscopeError(
            f"Expected a model with a list of like blocks, but {type(model).__name__} has none; call "
            "torch.distributed.fsdp.fully_shard on what is to be gathered at a time."
        )
    device = next(model.parameters()).device.type
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    for block in trunk.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def mesh_of(layout: str, device: str, ranks_per_node: int) -> DeviceMesh:
    """All ranks in one dimension for "fsdp"; (nodes, ranks of a node) for "hsdp"."""
    ranks = dist.get_world_size()
    if layout == "fsdp":
        return init_device_mesh(device, (ranks,))
    if ranks % ranks_per_node or not 1 < ranks_per_node < ranks:
        raise HesscopeError(
            f"Expected several nodes of several ranks each with --layout hsdp, got {ranks} ranks, {ranks_per_node} on this "
            "node; use --layout fsdp."
        )
    shape = ranks // ranks_per_node, ranks_per_node
    return init_device_mesh(device, shape, mesh_dim_names=("replicas", "shards"))
