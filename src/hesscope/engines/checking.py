"""Holding one engine to another."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesscope.errors import HesscopeError
from hesscope.losses.cross_entropy import IGNORED
from hesscope.problem import Problem
from hesscope.problem.microbatches import split
from hesscope.space import Space, Vectors, vectors


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
            first = next(p for p in (problem.related(batches=[one]) for one in split(batch, 1)) if p.counts[0] > 0)
        except (HesscopeError, StopIteration):
            return problem.subset([b])
        return first
    return problem


def short_slice(problem: Problem, length: int = 32) -> Problem:
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
    return short if short.counts[0] > 0 else small


def disagreement(space: Space, x: Vectors, y: Vectors) -> float:
    """|x - y| / max(|x|, |y|), the largest over the vectors; zero where both are zero, infinite where one is not finite."""
    gaps, sizes = space.norms(vectors.add(x, y, -1.0)), torch.maximum(space.norms(x), space.norms(y))
    found = torch.where(gaps == 0, 0.0, gaps / sizes)
    return float(found.max()) if bool(torch.isfinite(found).all()) else math.inf


def largest_disagreement(space: Space, x: Vectors, y: Vectors) -> float:
    """The largest |x - y| / |y| over the parameters, each against at least a thousandth of the whole |y|; x, y one vector."""
    floor = max(1e-3 * float(space.norms(y)), 1e-300)
    gaps = [
        float((x[c.name] - y[c.name]).double().norm()) / max(float(y[c.name].double().norm()), floor)
        for c in space.coordinates
        if not torch.equal(x[c.name], y[c.name])
    ]
    return max(gaps, default=0.0) if all(map(math.isfinite, gaps)) else math.inf


def close(space: Space) -> float:
    """The largest disagreement that passes for rounding of the same arrangement; models may cast to float32 inside."""
    return _rounding(space, 3e-5)


def tolerated(space: Space) -> float:
    """The largest disagreement that passes for rounding: models in float64 may cast to float32 inside."""
    return _rounding(space, 1e-3)


def _rounding(space: Space, least: float) -> float:
    return min(max(1000 * max(torch.finfo(c.dtype).eps for c in space.coordinates), least), 0.1)
