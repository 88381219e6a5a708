"""Freezing batches: read once, copied, kept on the CPU, hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from hesscope.digest import update_with_tensor
from hesscope.errors import HesscopeError


def freeze(batches: Iterable[Any]) -> tuple[Any, ...]:
    """A private copy of every batch, in order."""
    if isinstance(batches, (str, Tensor)) or not isinstance(batches, Iterable):
        raise HesscopeError(f"Expected an iterable of batches, got {type(batches).__name__}; wrap a batch in a list.")
    frozen = tuple(tree_map(_copy, dict(b) if isinstance(b, Mapping) else b) for b in batches)
    if not frozen:
        raise HesscopeError("Expected at least one batch, got none; an iterator that was read before is empty.")
    return frozen


def _copy(x: Any) -> Any:
    return x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x


def content_hash(batches: tuple[Any, ...]) -> str:
    """SHA-256 over structure, dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        digest.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                update_with_tensor(digest, leaf)
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()
