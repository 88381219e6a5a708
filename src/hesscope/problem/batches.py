"""Freezing batches: read once, copied, kept on the CPU, hashed; and cutting them into sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

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
    if isinstance(x, np.ndarray):
        return x.copy()
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
            elif (
                isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject
            ):  # whose text leaves out what is in the middle
                digest.update(f"{leaf.dtype.str} {leaf.shape} ".encode() + leaf.tobytes())
            else:
                text = repr(leaf).encode()
                digest.update(f"{len(text)} ".encode() + text)  # with its length: 1, 23 is not 12, 3
    return digest.hexdigest()


def sequences_in(b: int, batch: Any) -> list[Any]:
    """The sequences (or examples) of batch b, each as a batch of its own; a batch of one comes back as it is.

    Tensors are cut along their first axis. Scalars, and tensors whose first axis has length one, are the same for all.

    Raises HesscopeError where tensors disagree about how many sequences there are, or a list may hold one number for each.
    """
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim() > 0]
    rows = _rows(batch, tensors)
    if rows == 1:
        return [batch]
    odd = sorted({x.shape[0] for x in tensors} - {1, rows})
    if odd or rows == 0 or _has_list_of(batch, rows):
        found = f"{rows} and {odd[0]}" if odd else "a list of numbers" if rows else "no sequence"
        raise HesscopeError(
            f"Expected every tensor of batch {b} to have the batch's sequences along its first axis, found {found}: how to "
            "split it is not known; make the batches hold one sequence each."
        )
    return [tree_map(lambda x, s=s: _row(x, s, rows), batch) for s in range(rows)]


def _rows(batch: Any, tensors: list[Tensor]) -> int:
    """How many sequences a batch has: by its input_ids, else by the longest first axis."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.dim() > 0:
        return ids.shape[0]
    return max((x.shape[0] for x in tensors), default=1)


def _row(x: Any, s: int, rows: int) -> Any:
    return x[s : s + 1] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows else x


def _has_list_of(batch: Any, rows: int) -> bool:
    """Whether a list inside the batch has one entry that is no tensor for each sequence, such as a weight."""
    if isinstance(batch, Mapping):
        return any(_has_list_of(part, rows) for part in batch.values())
    if isinstance(batch, (list, tuple)):
        plain = [part for part in batch if not isinstance(part, (Tensor, Mapping, list, tuple))]
        return len(plain) == rows or any(_has_list_of(part, rows) for part in batch)
    return False


def longest(batch: Any) -> int:
    """The most positions that any of a batch's token tensors has; 0 where it holds none."""
    return max((x.shape[1] for x in tree_leaves(batch) if _is_tokens(x)), default=0)


def a_few_tokens(batch: Any, length: int = 32) -> Any:
    """The first tokens of a batch's first sequence; the whole batch where it is not one of tokens."""
    tokens = [x for x in tree_leaves(batch) if _is_tokens(x)]
    others = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim() > 0 and not _is_tokens(x)]
    if not tokens or others:
        return batch
    return tree_map(lambda x: x[:1, :length] if isinstance(x, Tensor) and x.dim() > 0 else x, batch)


def _is_tokens(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()
