"""The parameters of a model: their names, their identity, their state."""

from __future__ import annotations

import hashlib

from torch import nn

from hesscope.digest import update_with_tensor


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
    return tuple((t.data_ptr(), t._version) for t in [*model.parameters(), *model.buffers()])


def fingerprint(model: nn.Module) -> str:
    """A SHA-256 of the architecture's name and of every parameter's and buffer's name, dtype, shape and bytes."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        update_with_tensor(digest, tensor)
    return digest.hexdigest()
