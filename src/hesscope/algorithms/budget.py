"""How many probes, and when an estimate is good enough."""

from __future__ import annotations

import math

from hesscope.errors import HesscopeError
from hesscope.operators.chunks import chunk_size

__all__ = ["FEWEST_PROBES", "check_estimation", "chunk_size", "probes_allowed"]

#: Sequential stopping before so many probes would trust a standard error that is itself noise.
FEWEST_PROBES = 30
_DEFAULT_PROBES = 100
METHODS = ("auto", "exact", "hutchinson")


def check_estimation(
    what: str, method: str, budget: int | None, target_error: float | None, n: int, methods: tuple[str, ...] = METHODS
) -> bool:
    """Whether a trace or diagonal of n entries is to be exact: when asked to be, or when that costs no more than probes.

    Raises HesscopeError for an unknown method, or a budget or a target that nothing can meet.
    """
    if method not in methods:
        raise HesscopeError(f"Expected method to be one of {', '.join(methods)}, got {method!r}.")
    if budget is not None and budget < 1:
        raise HesscopeError(f"Expected budget to be at least 1 product, got {budget}.")
    if target_error is not None and not 0 < target_error < 1:
        raise HesscopeError(f"Expected target_error to be relative, between 0 and 1, got {target_error}.")
    if method == "exact" and budget is not None and n > budget:
        raise HesscopeError(f"Expected a budget of at least {n} products for an exact {what}, got {budget}.")
    return method == "exact" or (method == "auto" and n <= (budget or _DEFAULT_PROBES))


def probes_allowed(budget: int | None, target_error: float | None) -> int:
    """The budget; without one a hundred, or a hundred times that where the target error decides."""
    if budget is not None:
        return budget
    return _DEFAULT_PROBES if target_error is None else 100 * _DEFAULT_PROBES


def probes_for(made: int, error: float, target: float, most: int) -> int:
    """Probes in all until an error that falls with the root of their number is down to its target, as far as one can see."""
    if error <= target:
        return made
    needed = made * (error / target) ** 2 if target > 0 else math.inf
    return math.ceil(min(needed, most))
