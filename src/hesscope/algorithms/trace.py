"""The trace of an operator."""

from __future__ import annotations

from pathlib import Path

import torch

from hesscope.algorithms.budget import check_estimation, probes_allowed
from hesscope.algorithms.checkpoint import Checkpoint, opened, run_seed
from hesscope.algorithms.diagonals import exact_entries, products_needed
from hesscope.algorithms.driver import drive
from hesscope.algorithms.traces import Hutchinson, HutchPlusPlus, TraceEstimator, UntilExact, XNysTrace, XTrace
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.operators.free import vectors_that_fit
from hesscope.results import Trace

_METHODS = ("auto", "exact", "hutchinson", "hutch++", "xtrace", "xnystrace")
#: Products that a method needs for an error at all.
_FEWEST = {"hutch++": 6, "xtrace": 4, "xnystrace": 2}
#: A sketch of more vectors than a hundred seldom pays, and it takes memory.
_LARGEST_SKETCH = 100


def trace(
    H: Operator,
    method: str = "auto",
    budget: int | None = None,
    target_error: float | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
) -> Trace:
    """The trace of an operator, exact or estimated.

    "hutchinson" (1990): for independent sign vectors z_1..z_m the mean of <z_i, A z_i> is unbiased with variance
    2/m sum_{i != j} A_ij^2; the standard error is the samples' own, with m - 1 degrees of freedom. The others take the
    large eigenvalues out first, which pays where few of them dominate: "hutch++" (Meyer, Musco, Musco and Woodruff,
    2021), whose standard error is as honest; "xtrace", and "xnystrace" for positive semidefinite operators (Epperly, Tropp
    and Webber, 2024), more exact still, with an error that is an indication.

    Args:
        method: "exact" (n products, or none where the operator knows its diagonal, as K-FAC does), one of the above, or "auto": exact where that needs no more products than the
            budget, else "xnystrace" where the operator declares itself positive semidefinite and a basis of the budget
            fits in memory, else "hutchinson", the only one that needs no basis. Where a target error decides, that goes over to "exact"
            once it is seen to take more products.
        budget: operator products at most; 100 by default, 10000 where a target error decides when to stop.
        target_error: stop once the standard error, relative to the estimate, is below; never before 30 probes (15 test
            vectors for "xtrace" and "xnystrace"). Intervals after stopping early cover somewhat less than they say.
        seed: of the random vectors; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

    Raises:
        HesscopeError: an unknown method, a budget or target out of range, "xnystrace" of an operator that is not positive
            semidefinite, or a product that is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.trace(hs.operator(torch.diag(torch.tensor([2.0, 1.0])))).estimate
        3.0
    """
    exact = check_estimation("trace", method, budget, target_error, products_needed(H), _METHODS)
    seed, most = run_seed(seed, checkpoint, H.comm), probes_allowed(budget, target_error)
    options = {"method": method, "budget": budget, "target_error": target_error, "seed": seed}
    n = H.space.size
    if exact:
        entries = exact_entries(H, "trace, exact")
        spent = drive(H, entries, options, checkpoint)
        samples = entries.values.to("cpu", torch.float64)
        return Trace(**spent, method="exact", estimate=float(samples.sum()), standard_error=0.0,
                     degrees_of_freedom=0, size=n, seed=seed, samples=samples)  # fmt: skip
    begun = None if checkpoint is None else H.comm.on_first(lambda: opened(checkpoint).known("algorithm"))
    estimator = _estimator(H, method, most, target_error, seed, begun)
    spent = drive(H, estimator, options, checkpoint)
    mean, error = estimator.estimate()
    return Trace(**spent, method=estimator.method, estimate=mean, standard_error=error,
                 degrees_of_freedom=estimator.degrees_of_freedom, size=n, seed=seed, samples=estimator.samples)  # fmt: skip


def _choice(H: Operator, budget: int, begun: str | None) -> str:
    """What was begun goes on, whatever memory is free now."""
    if begun == Hutchinson.description:
        return "hutchinson"
    if begun == XNysTrace.description and H.positive_semidefinite:
        return "xnystrace"
    fits = vectors_that_fit(H.comm, H.space, H.dtype.itemsize) > 4 * min(budget, H.space.size)
    return "xnystrace" if H.positive_semidefinite and fits and budget >= 15 else "hutchinson"


def _estimator(
    H: Operator, method: str, budget: int, target: float | None, seed: int, begun: str | None
) -> TraceEstimator:
    if method == "auto":
        method = _choice(H, budget, begun)
        if method == "hutchinson" and target is not None:
            return UntilExact(H, budget, target, seed)
    if budget < _FEWEST.get(method, 1):
        raise HesscopeError(f"Expected a budget of at least {_FEWEST[method]} products for {method}, got {budget}.")
    if method == "hutch++":
        sketch = min(budget // 3, H.space.size, _LARGEST_SKETCH if target is not None else budget)
        return HutchPlusPlus(H, budget, sketch, target, seed)
    if method == "xtrace":
        return XTrace(H, budget, target, seed)
    if method == "xnystrace":
        return XNysTrace(H, budget, target, seed)
    return Hutchinson(H, budget, target, seed)
