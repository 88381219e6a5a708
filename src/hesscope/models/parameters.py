"""The parameters of a model: their names, their identity, their state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hesscope.digest import update_with_tensor
from hesscope.memory import storage_key


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, whose hooks belong to training; itself where it is in none."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def class_name(model: nn.Module) -> str:
    """The name of the model's own class, which `fully_shard` puts another in front of."""
    return next(c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed.fsdp")).__name__


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is one of torch.distributed's, of which this process may hold a part only."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "to_local")


def local_rows(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is divided; it shares the memory."""
    with torch.no_grad():
        rows: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return rows.detach()


def divided_axis(tensor: Tensor) -> int | None:
    """The axis along which a tensor of torch.distributed's is divided; None where every process has all of it."""
    axes: list[int] = [place.dim for place in tensor.placements if hasattr(place, "dim")]  # type: ignore[attr-defined]
    return axes[0] % tensor.dim() if axes else None


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, under its first name, in the order of `model.named_parameters()`."""
    return dict(model.named_parameters())


def aliases(model: nn.Module) -> dict[str, str]:
    """{every name: the first name of the same parameter}; tied parameters have several names."""
    first: dict[int, str] = {}
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        result[name] = first.setdefault(id(parameter), name)
    return result


def state_key(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes whenever a parameter or buffer is written in place or its storage is replaced; cheap to compute."""
    tensors = [local_rows(t) if is_sharded(t) else t for t in [*model.parameters(), *model.buffers()]]
    return tuple((storage_key(t), t._version) for t in tensors)


def fingerprint(model: nn.Module, values: Callable[[str, Tensor], Tensor] = lambda name, own: own) -> str:
    """A SHA-256 of the architecture's name and of every parameter's and buffer's name, dtype, shape and bytes.

    `values` finds those of a tensor that has none itself.
    """
    digest = hashlib.sha256(class_name(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        update_with_tensor(digest, values(name, tensor))
    return digest.hexdigest()
