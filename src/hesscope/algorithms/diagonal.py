"""The diagonal of an operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.budget import check_estimation, probes_allowed
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.diagonals import Estimator, Limits, exact_entries, products_needed, relative_error
from hesscope.algorithms.diagonals.automatic import Automatic
from hesscope.algorithms.diagonals.control_variate import FEWEST, ControlVariate
from hesscope.algorithms.diagonals.deflated import Deflated
from hesscope.algorithms.diagonals.hutchinson import Hutchinson
from hesscope.algorithms.diagonals.nystrom import Nystrom
from hesscope.algorithms.diagonals.per_sequence import PerSequence
from hesscope.algorithms.diagonals.sampled import Sampled
from hesscope.algorithms.diagonals.xdiag import XDiag
from hesscope.algorithms.driver import drive
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import Diagonal

#: Estimators by name, and the fewest products with which each gives an estimate and an error.
ESTIMATORS: dict[str, tuple[Callable[[Operator, Limits, int], Estimator], int]] = {
    "hutchinson": (Hutchinson, 1),
    "gaussian": (lambda H, limits, seed: Hutchinson(H, limits, seed, "gaussian"), 1),
    "deflated": (Deflated, 1),
    "xdiag": (XDiag, 4),
    "nystrom": (Nystrom, 1),
    "sampled": (Sampled, 1),
    "per-sequence": (PerSequence, 1),
    "control-variate": (ControlVariate, FEWEST),
    "auto": (Automatic, 1),
}
METHODS = ("auto", "exact", *(name for name in ESTIMATORS if name != "auto"))
#: With a target error "auto" is exact at once for so few weights only: an estimate takes a pilot and 30 probes at least.
_FEW = 100


def diagonal(
    H: Operator,
    method: str = "auto",
    budget: int | None = None,
    target_error: float | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    max_seconds: float | None = None,
    directions: int | None = None,
) -> Diagonal:
    """The diagonal of an operator, exact or estimated with a standard error for every entry.

    Every estimate is unbiased. With independent sign vectors z, z * (A z) is a sample whose variance in entry i is
    sum_{j != i} A_ij^2 (Hutchinson, 1990; Bekas, Kokiopoulou and Saad, 2007). The other estimators remove off-diagonal
    entries first.

    Standard errors and the relative error are those of the sampling. What products, and sums of vectors, lose to rounding is
    common to all samples, and to "exact", whose error is stated as zero; it is not in them. `H.product_error()` measures that of
    a product. In a bfloat16 model a diagonal's is about as large, and most of the error of "deflated", "xdiag" and "nystrom".

    Args:
        method: "exact" (n products at most, or none where the operator knows its diagonal, as K-FAC does); "hutchinson" ("rademacher" is the same) and "gaussian", independent probes;
            "deflated", exact on a Krylov space and probes on its complement; "xdiag", leave-one-out; "nystrom", deflation
            with a low-rank approximation made of the other probes; "sampled", gradients at labels drawn from the model, for
            a GGN; "per-sequence", a probe of its own for every sequence in the same pass, for a Hessian; "control-variate",
            for a Hessian H with the Gauss-Newton matrix G, draws of diag(G) and a probe of H - G; or "auto": what a short
            pilot finds best (of "hutchinson" and "nystrom" where vectors are divided among processes), and exact where
            that needs no more products than the budget or, with a target error, than the estimate is seen to need.
        budget: operator products at most; 100 by default, 10000 where a target error or a time decides when to stop.
        target_error: stop once the estimated |d_hat - d| / |d| over the whole selection is below; never before 30 probes.
        seed: of the random vectors; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.
        max_seconds: stop after so many seconds of work, however far it came; never before two probes.
        directions: how many a "deflated" estimate removes; half the budget by default, and at most 100 of an open one.

    Raises:
        HesscopeError: an unknown method, a budget, target or time out of range, vectors that would not fit in memory, or a
            product that is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.diagonal(hs.operator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))).flat()
        tensor([2., 3.])
    """
    method = "hutchinson" if method == "rademacher" else method
    _check(method, max_seconds, directions)
    n = products_needed(H)
    exact = check_estimation("diagonal", method, budget, target_error, n, METHODS)
    exact = exact and not (method == "auto" and target_error is not None and n > _FEW)
    open_ended = target_error is not None or max_seconds is not None
    limits = Limits(probes_allowed(budget, 0.0 if open_ended else None), target_error, max_seconds)
    seed = run_seed(seed, checkpoint, H.comm)
    options = {"method": method, "budget": budget, "target_error": target_error, "seed": seed}
    options |= {k: v for k, v in (("max_seconds", max_seconds), ("directions", directions)) if v is not None}
    if exact:
        H = H.undivided()
        entries = exact_entries(H, "diagonal, exact")
        spent = drive(H, entries, options, checkpoint)
        return _exact(H, spent, entries.values, seed)
    run = estimator(H, method, limits, seed, directions)
    spent = drive(H, run, options, checkpoint)
    found = run.estimate()
    del run  # what it kept makes room for all of the result
    spent["provenance"]["estimator"] = found.record
    values, errors = H.space.collected(found.values), H.space.collected(found.standard_error)
    return Diagonal(**spent, method=found.method, values=values, standard_error=errors,
                    relative_error=relative_error(values, errors), degrees_of_freedom=found.degrees_of_freedom,
                    seed=seed)  # fmt: skip


def _check(method: str, max_seconds: float | None, directions: int | None) -> None:
    if max_seconds is not None and not max_seconds > 0:
        raise HesscopeError(f"Expected max_seconds to be positive, got {max_seconds}.")
    if directions is not None and method != "deflated":
        raise HesscopeError(f"Expected directions= with method='deflated' only, got method={method!r}.")
    if directions is not None and directions < 0:
        raise HesscopeError(f"Expected directions to be at least 0, got {directions}.")


def estimator(H: Operator, method: str, limits: Limits, seed: int, directions: int | None = None) -> Estimator:
    """The estimator of that name, ready to begin."""
    make, fewest = ESTIMATORS[method]
    if directions is not None:
        make, fewest = lambda H, limits, seed: Deflated(H, limits, seed, directions), directions + 1
    if limits.products < fewest:
        raise HesscopeError(
            f"Expected a budget of at least {fewest} products for method={method!r}, got {limits.products}."
        )
    return make(H, limits, seed)


def _exact(H: Operator, spent: dict[str, Any], flat: Tensor, seed: int) -> Diagonal:
    values = {name: part[0] for name, part in H.space.unflatten(flat[:, None]).items()}
    zeros = {name: torch.zeros_like(part) for name, part in values.items()}
    return Diagonal(**spent, method="exact", values=values, standard_error=zeros,
                    relative_error=0.0, degrees_of_freedom=0, seed=seed)  # fmt: skip
