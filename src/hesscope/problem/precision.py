"""The same problem in another dtype, and a model's own casts left out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hesscope.models import elsewhere
from hesscope.problem.problem import Problem
from hesscope.space import Space


def in_float64(problem: Problem, space: Space) -> tuple[Problem, Space]:
    """A float64 copy of the problem and the space over it; itself where it is float64, or where there can be no copy.

    Dropout masks depend on the dtype that they are drawn in; offloaded weights come in the dtype that they have, and those that
    are divided among processes are not copied.
    """
    wide = all(p.dtype == torch.float64 for p in problem.model.parameters())
    if wide or problem.dropout == "frozen" or elsewhere(problem.model) is not None:
        return problem, space
    return in_dtype(problem, space, torch.float64)


def in_dtype(problem: Problem, space: Space, dtype: torch.dtype) -> tuple[Problem, Space]:
    """A copy of the problem with weights and data in a dtype, and the space over it."""
    batches = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, problem.batches)
    model = copy.deepcopy(problem.model)
    # accelerate puts a `to` on a model that it spreads, which in the copy would still convert the original.
    twin = problem.related(model=type(model).to(model, dtype), batches=batches)
    return twin, Space([replace(c, dtype=dtype) for c in space.coordinates])


class WithoutCasts(TorchFunctionMode):
    """Every float32 that a model asks for is a float64: a float64 model that casts to float32 inside stays what it is.

    Nearly all models cast somewhere: their normalisations, the softmax of their attention, their rotations.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Whether a cast would have lost digits.
        self.mattered = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = func is Tensor.float or any(x is torch.float32 for x in (*args, *kwargs.values()))
        if not asked:
            return func(*args, **kwargs)
        self.mattered |= any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        return func(*args, **{name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()})
