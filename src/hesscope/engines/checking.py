"""Holding one engine to another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesscope.errors import HesscopeError
from hesscope.losses.cross_entropy import IGNORED
from hesscope.problem import Problem
from hesscope.problem.microbatches import count_rows, split
from hesscope.space import Space, Vectors, vectors

#: Exact in every dtype, and no powers of two: products with such multiples of a vector are rounded anew.
MULTIPLES = (1.125, 1.25, 1.375, 1.5, 1.625, 1.75)
#: Two arrangements of one product differ by less than so many times what that does.
_BEYOND = 6.0
#: Tokens of a sequence that a look at some of them takes at least.
_SHORTEST = 32


def one_sequence(problem: Problem) -> Problem:
    """The problem on its first sequence that has a term, as cheap a look at the model as there is.

    Frozen masks belong to a whole batch, and some batches cannot be split; then it is the first batch that has a term.
    """
    for b, batch in enumerate(problem.batches):
        if problem.counts[b] == 0:
            continue
        if problem.dropout == "frozen":
            return problem.subset([b])
        try:
            first = next(p for p in (problem.related(batches=[one]) for one in split(batch, 1)) if _has_terms(p))
        except (HesscopeError, StopIteration):
            return problem.subset([b])
        return first
    return problem


def short_slice(problem: Problem, length: int = _SHORTEST) -> Problem:
    """`one_sequence`, and of a sequence of tokens at most `length` of them, some of whose targets count.

    A look at what does not fit as a whole.
    """
    small = one_sequence(problem)
    batch = small.batches[0]
    ids, labels = (batch.get(key) if isinstance(batch, Mapping) else None for key in ("input_ids", "labels"))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape or ids.dim() != 2:
        return small
    if ids.shape[1] <= length or problem.dropout == "frozen":
        return small
    others = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.shape[:2] != ids.shape]
    if any(ids.shape[1] in x.shape for x in others):  # along the tokens, in a way that is not known
        return small
    first = int((labels != IGNORED).any(0).float().argmax())
    start = min(max(first - 1, 0), ids.shape[1] - length)
    window = {
        name: x[:, start : start + length] if isinstance(x, Tensor) and x.shape[:2] == ids.shape else x
        for name, x in batch.items()
    }
    short = problem.related(batches=[window])
    return short if _has_terms(short) else small


def leading_part(problem: Problem, terms: float) -> Problem:
    """The first batch, or the beginning of it that has about so many terms: whole sequences, or some tokens of one.

    What cannot be cut stays whole.
    """
    first = problem.subset([0])
    rows = None if problem.dropout == "frozen" else count_rows(first.batches[0])
    if first.counts[0] <= terms or rows is None:
        return first
    share = rows * terms / first.counts[0]
    if share < 1.0:
        ids = first.batches[0].get("input_ids") if isinstance(first.batches[0], Mapping) else None
        return (
            short_slice(first, max(_SHORTEST, int(share * ids.shape[-1])))
            if isinstance(ids, Tensor)
            else one_sequence(first)
        )
    part = first.related(batches=split(first.batches[0], int(share))[:1])
    return part if _has_terms(part) else first


def _has_terms(problem: Problem) -> bool:
    """Whether anything is counted; a problem without a term says so with an error."""
    try:
        return problem.N > 0
    except HesscopeError:
        return False


def disagreement(space: Space, x: Vectors, y: Vectors) -> float:
    """|x - y| / max(|x|, |y|), the largest over the vectors; zero where both are zero, infinite where one is not finite."""
    gaps, sizes = space.norms(vectors.add(x, y, -1.0)), torch.maximum(space.norms(x), space.norms(y))
    found = torch.where(gaps == 0, 0.0, gaps / sizes)
    return float(found.max()) if bool(torch.isfinite(found).all()) else math.inf


def largest_disagreement(space: Space, x: Vectors, y: Vectors, rounding: Mapping[str, float] | None = None) -> float:
    """The largest |x - y| / |y| over the parameters, each against at least a thousandth of the whole |y|; x, y one vector.

    With `rounding`, that of every parameter of y, only over those whose |x - y| is more than rounding does.
    """
    floor = max(1e-3 * float(space.norms(y)), 1e-300)
    gaps = {name: _distance(x[name], y[name]) for name in space.names if not torch.equal(x[name], y[name])}
    found = [
        gap / max(float(y[name].double().norm()), floor)
        for name, gap in gaps.items()
        if rounding is None or not gap <= _BEYOND * rounding[name]
    ]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf


def rounding_by_parameter(
    space: Space, add_product: Callable[[Vectors, Vectors], None], v: Vectors, y: Vectors
) -> dict[str, float]:
    """The most that y, the product with v, differs from those with multiples of v: what rounding alone does."""
    found = dict.fromkeys(space.names, 0.0)
    for factor in MULTIPLES:
        multiple = space.zeros()
        add_product(vectors.scale(v, factor), multiple)
        vectors.scale_(multiple, 1 / factor)
        found = {name: max(found[name], _distance(multiple[name], y[name])) for name in found}
    return found


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().norm())


def close(space: Space) -> float:
    """The largest disagreement that passes for rounding of the same arrangement; models may cast to float32 inside."""
    return _rounding(space, 3e-5)


def tolerated(space: Space) -> float:
    """The largest disagreement that passes for rounding: models in float64 may cast to float32 inside."""
    return _rounding(space, 1e-3)


def _rounding(space: Space, least: float) -> float:
    return min(max(1000 * max(torch.finfo(c.dtype).eps for c in space.coordinates), least), 0.1)
