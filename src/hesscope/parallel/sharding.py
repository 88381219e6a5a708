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


def mesh_of(layout: str, device: str, ranks_per_node: int, probe_groups: int = 1) -> DeviceMesh:
    """All ranks in one dimension for "fsdp"; (replicas, shards) for "hsdp": a replica a probe group, or a node where there are none."""
    ranks = dist.get_world_size()
    if layout == "fsdp":
        return init_device_mesh(device, (ranks,))
    shards = ranks // probe_groups if probe_groups > 1 else ranks_per_node
    if ranks % shards or not 1 < shards < ranks:
        raise HesscopeError(
            f"Expected several nodes, or --probe-groups, of several ranks each with --layout hsdp, got {ranks} ranks, {shards} in "
            "each; use --layout fsdp."
        )
    return init_device_mesh(device, (ranks // shards, shards), mesh_dim_names=("replicas", "shards"))
