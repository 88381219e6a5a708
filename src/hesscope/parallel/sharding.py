"""A model divided among processes by PyTorch's own `fully_shard`, block by block."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from hesscope.communicator import Communicator
from hesscope.errors import HesscopeError
from hesscope.models import find_trunk, is_fully_sharded, is_sharded, offloaded
from hesscope.models.empty import Slot, is_empty, slots, without_hooks
from hesscope.parallel.ranks import TIMEOUT, Ranks
from hesscope.parallel.watch import LONGEST


def fully_shard_model(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Divide a model's weights among the ranks, each block of its trunk by itself and the rest together, in place.

    It is `torch.distributed.fsdp.fully_shard` called on every block and then on the model; a script may as well do that itself,
    or hand over a model that training has divided. Either every rank has loaded the model, with the same weights, or rank 0 has
    and others bring it empty, made on the meta device: rank 0 then gives out its weights, a block at a time, and no other rank
    ever holds more of them than its own and one block. Nor does rank 0 where it has loaded the model with its weights on disk
    (`device_map={"": "disk"}, offload_folder=...` of from_pretrained).

    Args:
        mesh: of one dimension, or of two, with names, for hybrid sharding (replicas, shards); all ranks in one dimension by default.
            On top of a tensor-parallel plan, another dimension of that plan's mesh.

    Raises:
        HesscopeError: no process group, a model without a list of like blocks, one that is divided already, or empty models that
            are not rank 0's, with all ranks in the mesh.

    Example:
        >>> import torch, torch.distributed as dist, hesscope as hs
        >>> from hesscope.assets import model_path
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)    # torchrun: without arguments
        >>> if dist.get_rank() == 0:
        ...     model = AutoModelForCausalLM.from_pretrained(model_path())
        ... else:
        ...     with torch.device("meta"):
        ...         model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path()))
        >>> type(hs.fully_shard_model(model.eval()).get_input_embeddings().weight).__name__
        'DTensor'
        >>> dist.destroy_process_group()
    """
    if not dist.is_initialized():
        raise HesscopeError("Expected an initialised process group; call torch.distributed.init_process_group first.")
    if mesh is not None and mesh.size() != dist.get_world_size():
        return shard_model(model, mesh, None)
    ranks = Ranks(None, TIMEOUT)
    try:
        with ranks.watched():
            shard_model(model, mesh, ranks)
            ranks.any(False)  # nobody leaves, and takes the store along, while another still reads
    finally:
        ranks.close()
    return model


def shard_model(model: nn.Module, mesh: DeviceMesh | None, comm: Communicator | None) -> nn.Module:
    """The same, through a communicator of all ranks of the mesh, or, without one, only with models that are loaded."""
    from torch.distributed.fsdp import fully_shard

    if is_fully_sharded(model):
        raise HesscopeError("Expected a model that is not divided yet; this one is, so leave fully_shard_model out.")
    if mesh is None and any(is_sharded(p) for p in model.parameters()):
        raise HesscopeError(
            "Expected mesh= with a model that a tensor-parallel plan has divided: another dimension of that plan's device mesh."
        )
    trunk = find_trunk(model)
    if trunk is None:
        raise HesscopeError(
            f"Expected a model with a list of like blocks, but {type(model).__name__} has none; call "
            "torch.distributed.fsdp.fully_shard on what is to be gathered at a time."
        )
    missing = _to_give_out(model, comm)
    device = comm.device_type if missing and comm is not None else next(model.parameters()).device.type
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    for i, block in enumerate(trunk.blocks):
        prefix = f"{trunk.prefix}.{i}"
        _give_out([slot for slot in missing if slot.inside(prefix)], comm)
        missing = [slot for slot in missing if not slot.inside(prefix)]
        fully_shard(block, mesh=mesh)
    _give_out(missing, comm)
    fully_shard(model, mesh=mesh)
    return model


def _to_give_out(model: nn.Module, comm: Communicator | None) -> list[Slot]:
    """What rank 0 has to give to the others; nothing where all have loaded the model."""
    if comm is None:
        if is_empty(model) or offloaded(model) is not None:
            raise HesscopeError(
                "Expected a mesh of all ranks with models on the meta device or on disk; or load the model on each."
            )
        return []
    empty, elsewhere = is_empty(model), offloaded(model) is not None
    own = without_hooks(model) if elsewhere else slots(model)
    found = comm.gathered((empty, [slot.outline() for slot in own], elsewhere))
    if not any(empty or elsewhere for empty, _, elsewhere in found):
        return []
    if found[0][0]:
        raise HesscopeError("Expected rank 0 to have loaded the model, but its weights are on the meta device.")
    others = [rank for rank, (_, outline, _) in enumerate(found) if outline != found[0][1]]
    if others:
        raise HesscopeError(
            f"Expected the same weights, shapes and dtypes on every rank, but rank {others[0]} has others than rank 0; make its model "
            "from the same configuration, in the same dtype."
        )
    return own


def _give_out(missing: list[Slot], comm: Communicator | None) -> None:
    """Give rank 0's tensors to the ranks that have none."""
    if not missing:
        return
    assert comm is not None
    values = comm.on_first(lambda: [slot.value for slot in missing])
    for slot, value in zip(missing, values, strict=True):
        if slot.tensor.is_meta:
            slot.put(value)


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
    mesh = init_device_mesh(device, (ranks // shards, shards), mesh_dim_names=("replicas", "shards"))
    for group in mesh.get_all_groups():
        _set_pg_timeout(LONGEST, group)
    return mesh
