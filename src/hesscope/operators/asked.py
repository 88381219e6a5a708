"""What an operator is asked for with: a problem, a selection of its own model, a precision that its engine has."""

from __future__ import annotations

import torch

from hesscope.arithmetic import resolve_precision
from hesscope.communicator import ALONE
from hesscope.engines import Auto
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.engines.streaming import Streamed
from hesscope.errors import HesscopeError
from hesscope.models import named_parameters, sharded
from hesscope.problem import Problem, select
from hesscope.space import Space

#: Engines that have passes in which everything is linear in the vectors.
APART = (Auto.name, ReverseOverReverse.name, Streamed.name)


def own_space(problem: object, space: object) -> Space:
    """The space, or that of every trainable parameter for None.

    Raises HesscopeError for what is no problem, no space, or another model's space.
    """
    if not isinstance(problem, Problem):
        raise HesscopeError(
            f"Expected a problem, from hs.causal_lm, hs.supervised or hs.Problem, got {type(problem).__name__}."
        )
    space = select(problem) if space is None else space
    if not isinstance(space, Space):
        raise HesscopeError(f"Expected a space, from hs.select(problem, ...), got {type(space).__name__}.")
    shapes = {name: tuple(p.shape) for name, p in named_parameters(problem.model).items()}
    if sharded(problem.model) is not None and problem.comm is ALONE:
        raise HesscopeError(
            "Expected the problem of a model whose weights are divided among processes to be divided, too: pass it through "
            "hs.data_parallel(problem) on every process."
        )
    for c in space.coordinates:
        if shapes.get(c.name) != c.parameter_shape:
            raise HesscopeError(
                f"Expected a selection from this problem's own model, but it has no {c.name!r} of shape "
                f"{list(c.parameter_shape)}; call hs.select with this problem."
            )
    return space


def sum_dtype(precision: str | None, dtype: torch.dtype) -> torch.dtype:
    """In which products of batches are summed."""
    return torch.float64 if precision == "float32" else dtype


def own_precision(precision: str | None, problem: Problem, engine: str) -> str | None:
    """The precision that was asked for, known to mean something for these weights, there, and with that engine."""
    weights = {p.dtype for p in problem.model.parameters() if p.is_floating_point()}
    found = resolve_precision(precision, weights, problem.device)
    if found == "bfloat16" and engine not in APART:
        raise HesscopeError(
            f"Expected engine to be {', '.join(APART[:-1])} or {APART[-1]} with precision='bfloat16', got {engine!r}: its passes "
            "mix what is linear in the vectors with what is not."
        )
    return found
