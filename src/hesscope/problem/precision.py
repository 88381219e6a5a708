"""The same problem in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hesscope.problem.problem import Problem
from hesscope.space import Space


def in_float64(problem: Problem, space: Space) -> tuple[Problem, Space]:
    """A float64 copy of the problem and the space over it; itself where it is float64, or where a frozen mask forbids it.

    Dropout masks depend on the dtype that they are drawn in.
    """
    if problem.dropout == "frozen" or all(p.dtype == torch.float64 for p in problem.model.parameters()):
        return problem, space
    batches = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, problem.batches)
    twin = problem.related(model=copy.deepcopy(problem.model).double(), batches=batches)
    return twin, Space([replace(c, dtype=torch.float64) for c in space.coordinates])
