"""Extreme eigenpairs by the Lanczos process."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hesscope.algorithms.budget import chunk_size
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.krylov import Krylov
from hesscope.algorithms.probing import rounding
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.operators import Operator
from hesscope.operators.graphs import available_bytes
from hesscope.results import Eigenpairs
from hesscope.space import Vectors, vectors
from hesscope.space.random import resolve_seed

_WHICH = ("LM", "LA", "SA", "BE")
_DEFAULT_STEPS = 300


def eigs(
    H: Operator,
    k: int = 6,
    which: str = "LM",
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: int | None = 0,
) -> Eigenpairs:
    """The k most extreme eigenpairs, by Lanczos with full reorthogonalisation.

    Args:
        k: how many, 1 to n.
        which: as in SciPy's `eigsh`: "LM" largest magnitude, "LA" largest, "SA" smallest (most negative), "BE" half from
            each end, the odd one from the upper.
        tol: each |A v - lambda v| is to be at most tol |lambda|, or what rounding allows.
        max_products: at most so many, k of them for measuring the residuals; by default about 300, or what memory holds.
        seed: of the start vector; None draws one and records it.

    Returns:
        Eigenvalues in the order wanted (by magnitude for "LM", descending for "LA" and "BE", ascending for "SA"), unit
        eigenvectors, and residuals measured by k products of their own. Where these miss `tol`, `converged` is False and
        a HesscopeWarning says so. One start vector sees one copy of a multiple eigenvalue until its space is exhausted.

    Raises:
        HesscopeError: k outside 1..n, an unknown `which`, too few products for k pairs.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.eigs(hs.operator(torch.diag(torch.tensor([3.0, -5.0, 1.0]))), k=2).eigenvalues
        tensor([-5.,  3.], dtype=torch.float64)
    """
    n = H.space.size
    if not 1 <= k <= n:
        raise HesscopeError(f"Expected k between 1 and {n}, the number of coordinates, got {k}.")
    if which not in _WHICH:
        raise HesscopeError(f"Expected which to be one of {', '.join(_WHICH)}, got {which!r}.")
    if not tol > 0:
        raise HesscopeError(f"Expected tol to be positive, got {tol}.")
    seed = resolve_seed(seed)
    search = _Search(H, k, which, tol, _most_steps(H, k, max_products), seed)
    spent = drive(H, search, {"k": k, "which": which, "tol": tol, "max_products": max_products, "seed": seed})
    # A float32 tensor prints 3.0 as 3.0000; the projected problem is float64 anyway.
    if not search.converged:
        warnings.warn(
            f"{int((~search.good).sum())} of {k} eigenpairs missed tol={tol:g} after {spent['products']} products; their "
            "measured residuals are in the result; allow more with max_products.",
            HesscopeWarning,
            stacklevel=2,
        )
    return Eigenpairs(**spent, which=which, eigenvalues=search.values, vectors=search.vectors, residuals=search.residuals,
                      tol=tol, converged=search.converged, steps=search.krylov.m, seed=seed)  # fmt: skip


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    """Positions of the k wanted among ascending values, in the order in which they are returned."""
    m = len(values)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)[:k]
    if which == "SA":
        return torch.arange(min(k, m))
    if which == "LA":
        return torch.arange(m - 1, max(m - 1 - k, -1), -1)
    low = k // 2
    return torch.cat([torch.arange(m - 1, m - 1 - (k - low), -1), torch.arange(low - 1, -1, -1)])


def _most_steps(H: Operator, k: int, max_products: int | None) -> int:
    if max_products is not None and max_products < 2 * k:
        raise HesscopeError(
            f"Expected max_products of at least {2 * k} for {k} pairs (k steps and k residuals), got {max_products}."
        )
    in_memory = available_bytes(H.space.device) // (2 * H.space.size * H.dtype.itemsize)
    steps = max(_DEFAULT_STEPS, 20 * k) if max_products is None else max_products - k
    if in_memory < k + 1 and in_memory < H.space.size:
        raise HesscopeError(
            f"Expected memory for a basis of {k + 1} vectors of {H.space.size} coordinates; only {in_memory} fit."
        )
    return min(steps, H.space.size, in_memory)


class _Search(Iteration):
    """Lanczos until the inferred residuals are small, then measure them; continue where a measurement disagrees."""

    description = "eigenpairs"

    def __init__(self, H: Operator, k: int, which: str, tol: float, most: int, seed: int) -> None:
        self._H, self._k, self._which, self._tol, self._most = H, k, which, tol, most
        self.krylov = Krylov(H, H.space.gaussian(seed, ["start"]), seed, restart=True)
        self.expected = most + k
        self._inferred_tol = tol
        self.done_ = False
        self._note = ""

    @property
    def done(self) -> bool:
        return self.done_

    def note(self) -> str:
        return self._note

    def step(self) -> None:
        self.krylov.step()
        m, last = self.krylov.m, self.krylov.ended or self.krylov.m >= self._most
        if m < self._k or (m > 50 and m % 5 and not last):
            return
        values, S = self.krylov.ritz()
        pick = wanted(values, self._k, self._which)
        inferred = self.krylov.residual_norm * S[-1, pick].abs()
        good = self._small(inferred, values[pick], self._inferred_tol)
        self._note = f"{int(good.sum())} of {self._k} converged"
        if last or bool(good.all()):
            self._measure(values[pick], S[:, pick])
            self.done_ = last or self.converged
            self._inferred_tol /= 10

    def _small(self, residuals: Tensor, values: Tensor, tol: float) -> Tensor:
        floor = 10 * rounding(self._H) * float(self.krylov.T.abs().max())
        return residuals <= (tol * values.abs()).clamp(min=floor)

    def _measure(self, values: Tensor, S_mk: Tensor) -> None:
        """Form the vectors and spend a product on each."""
        space = self._H.space
        V = space.combine(self.krylov.basis, S_mk)
        V = space.combine(V, torch.diag(1.0 / space.norms(V)))
        residuals = []
        for start in range(0, self._k, chunk := chunk_size(self._H)):
            part = vectors.columns(V, start, start + chunk)
            scaled = space.combine(part, torch.diag(values[start : start + chunk]))
            residuals.append(space.norms(vectors.add(self._H.matmat(part), scaled, -1.0)))
        self.vectors: Vectors = V
        self.values, self.residuals = values, torch.cat(residuals)
        self.good = self._small(self.residuals, values, self._tol)
        self.converged = bool(self.good.all())
