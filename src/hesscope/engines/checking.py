"""Holding one engine to another."""

from __future__ import annotations

import math

import torch

from hesscope.errors import HesscopeError
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


def disagreement(space: Space, x: Vectors, y: Vectors) -> float:
    """|x - y| / max(|x|, |y|), the largest over the vectors; zero where both are zero, infinite where one is not finite."""
    gaps, sizes = space.norms(vectors.add(x, y, -1.0)), torch.maximum(space.norms(x), space.norms(y))
    found = torch.where(gaps == 0, 0.0, gaps / sizes)
    return float(found.max()) if bool(torch.isfinite(found).all()) else math.inf


def tolerated(space: Space) -> float:
    """The largest disagreement that passes for rounding: models in float64 may cast to float32 inside."""
    return min(max(1000 * max(torch.finfo(c.dtype).eps for c in space.coordinates), 1e-3), 0.1)
