"""The same problem in smaller batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hesscope.errors import HesscopeError
from hesscope.problem.problem import Problem


def microbatched(problem: Problem, size: int) -> Problem:
    """The problem with every batch split into batches of at most `size` sequences (examples, for other losses).

    The risk is one sum divided by one count, so it stays the same; that this holds for the loss at hand is checked on the
    first sequences.

    Raises:
        HesscopeError: a size below 1, frozen dropout (its masks belong to whole batches), a batch whose tensors have no
            axis of sequences in common, a loss that is no sum over sequences.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise HesscopeError(f"Expected microbatch to be a whole number of sequences, 1 or more, got {size!r}.")
    if problem.dropout == "frozen":
        raise HesscopeError(
            "Expected dropout='off' with microbatch: frozen masks are drawn for whole batches, and would be others for "
            "parts; make the problem with a smaller batch_size instead."
        )
    parts = [part for b, batch in enumerate(problem.batches) for part in split(batch, size, f"batch {b}")]
    result = problem.related(batches=parts)
    _require_additive(problem, size)
    return result


def split(batch: Any, size: int, what: str = "the batch") -> list[Any]:
    """A batch as batches of at most `size` rows; tensors with one row, or without the axis, belong to all of them."""
    rows = count_rows(batch)
    if rows is None:
        raise HesscopeError(
            f"Expected the tensors of {what} to have their first axis, over sequences, in common in order to split it, got "
            f"shapes {', '.join(str(list(x.shape)) for x in _tensors(batch))}; leave microbatch out, or make smaller batches."
        )
    return [_rows(batch, rows, start, start + size) for start in range(0, rows, size)]


def count_rows(batch: Any) -> int | None:
    """How many sequences or examples a batch has: the first dimension that its tensors share; None where they do not."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return len(batch["input_ids"])
    sizes = {x.shape[0] for x in _tensors(batch) if x.dim() and x.shape[0] != 1}
    return None if len(sizes) > 1 else sizes.pop() if sizes else 1


def _tensors(batch: Any) -> list[Tensor]:
    return [x for x in tree_leaves(batch) if isinstance(x, Tensor)]


def _rows(batch: Any, rows: int, start: int, stop: int) -> Any:
    """Rows start..stop of whatever has `rows` rows."""

    def cut(x: Any) -> Any:
        return x[start:stop] if isinstance(x, Tensor) and x.dim() and x.shape[0] == rows else x

    return tree_map(cut, batch)


def _require_additive(problem: Problem, size: int) -> None:
    """Raise HesscopeError where two parts' sums do not add up to that of both together."""
    b = next((b for b, batch in enumerate(problem.batches) if (count_rows(batch) or 1) > size), None)
    if b is None:
        return
    both = split(problem.batches[b], 2 * size)[0]
    whole, parts = problem.related(batches=[both]), problem.related(batches=split(both, size))
    with torch.no_grad():
        together, terms = whole.total(0)
        found = [parts.total(p) for p in range(len(parts.batches))]
    total, count = sum(float(part) for part, _ in found), sum(n for _, n in found)
    precision = max(torch.finfo(p.dtype).eps for p in problem.model.parameters())
    if count != terms or not math.isclose(total, float(together), rel_tol=min(max(100 * precision, 1e-4), 0.05)):
        raise HesscopeError(
            f"Expected the loss to be a sum over sequences, but the first ones of batch {b} give {float(together):.6g} over "
            f"{terms} terms together and {total:.6g} over {count} apart; leave microbatch out."
        )
