"""Extreme eigenpairs by the Lanczos process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.krylov import Krylov
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.memory import available_bytes
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.results import Eigenpairs
from hesscope.space import Vectors, vectors

_WHICH = ("LM", "LA", "SA", "BE")
_DEFAULT_STEPS = 300


def eigs(
    H: Operator,
    k: int = 6,
    which: str = "LM",
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
) -> Eigenpairs:
    """The k most extreme eigenpairs, by Lanczos with full reorthogonalisation.

    Args:
        k: how many, 1 to n.
        which: as in SciPy's `eigsh`: "LM" largest magnitude, "LA" largest, "SA" smallest (most negative), "BE" half from
            each end, the odd one from the upper.
        tol: each |A v - lambda v| is to be at most tol |lambda|, or what rounding allows: the parameters' (relative to
            lambda) and the vectors' (relative to the operator).
        max_products: at most so many, k of them for measuring the residuals; by default about 300, or what memory holds.
        seed: of the start vector; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

    Returns:
        Eigenvalues in the order wanted (by magnitude for "LM", descending for "LA" and "BE", ascending for "SA"), unit
        eigenvectors, and residuals measured by k products of their own. Where these miss `tol`, `converged` is False and
        a HesscopeWarning says so. One start vector sees one copy of a multiple eigenvalue until its space is exhausted;
        from then on every copy is found.

    Raises:
        HesscopeError: k outside 1..n, an unknown `which`, too few products for k pairs.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.eigs(hs.operator(torch.diag(torch.tensor([3.0, -5.0, 1.0]).double())), k=2).eigenvalues.round(decimals=6)
        tensor([-5.,  3.], dtype=torch.float64)
    """
    n = H.space.size
    if not 1 <= k <= n:
        raise HesscopeError(f"Expected k between 1 and {n}, the number of coordinates, got {k}.")
    if which not in _WHICH:
        raise HesscopeError(f"Expected which to be one of {', '.join(_WHICH)}, got {which!r}.")
    if not tol > 0:
        raise HesscopeError(f"Expected tol to be positive, got {tol}.")
    seed = run_seed(seed, checkpoint)
    search = _Search(H, k, which, tol, _most_products(k, max_products), _most_steps(H, k), seed)
    options = {"k": k, "which": which, "tol": tol, "max_products": max_products, "seed": seed}
    spent = drive(H, search, options, checkpoint)
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


def _ends(found: Tensor, which: str) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The ends of the spectrum that are wanted: what is largest there, and the values found there."""
    if which == "LM":
        return [(torch.abs, found)]
    if which == "LA":
        return [(torch.positive, found)]
    if which == "SA":
        return [(torch.neg, found)]
    upper = len(found) - len(found) // 2
    return [end for end in ((torch.positive, found[:upper]), (torch.neg, found[upper:])) if len(end[1])]


def _most_products(k: int, max_products: int | None) -> int:
    if max_products is None:
        return max(_DEFAULT_STEPS, 20 * k) + k
    if max_products < 2 * k:
        raise HesscopeError(
            f"Expected max_products of at least {2 * k} for {k} pairs (k steps and k residuals), got {max_products}."
        )
    return max_products


def _most_steps(H: Operator, k: int) -> int:
    in_memory = available_bytes(H.space.device) // (2 * H.space.size * H.dtype.itemsize)
    if in_memory < k + 1 and in_memory < H.space.size:
        raise HesscopeError(
            f"Expected memory for a basis of {k + 1} vectors of {H.space.size} coordinates; only {in_memory} fit."
        )
    return min(H.space.size, in_memory)


#: What a search knows beside its Krylov run; the most steps and products because they came from the memory that was free.
_COUNTERS = ("_steps", "expected", "_inferred_tol", "_measuring", "_look_again", "done_", "_note")
#: What its last measurement found.
_MEASURED = ("vectors", "values", "residuals", "good", "converged")


class _Search(Iteration):
    """Lanczos until the inferred residuals are small, then measure them; continue where a measurement disagrees."""

    description = "eigenpairs"
    at_most = True

    def __init__(self, H: Operator, k: int, which: str, tol: float, products: int, steps: int, seed: int) -> None:
        self._H, self._k, self._which, self._tol = H, k, which, tol
        self._products, self._steps = products, steps
        self.krylov = Krylov(H, H.space.gaussian(seed, ["start"]), seed, restart=True)
        self.expected = min(products, steps + k)
        self._inferred_tol = tol
        self._measuring, self._look_again = 0, 0
        self.done_ = False
        self._note = ""
        self.vectors: Vectors = {}

    @property
    def done(self) -> bool:
        return self.done_

    def note(self) -> str:
        return self._note

    def state(self) -> dict[str, Any]:
        names = [*_COUNTERS, *(_MEASURED if self.done_ else ())]
        return {"krylov": self.krylov.state(), **{name: getattr(self, name) for name in names}}

    def restore(self, state: dict[str, Any]) -> None:
        self.krylov.restore(state.pop("krylov"))
        for name, value in state.items():
            setattr(self, name, value)
        if self.done_:
            self.vectors = self._H.space.place(self.vectors)

    def step(self) -> None:
        self.krylov.step()
        m = self.krylov.m
        # The measurement that ends the search is paid for from the same purse.
        last = m == self._steps or m + self._measuring + self._k == self._products
        if m < self._k or ((m < self._look_again or (m > 50 and m % 5)) and not last):
            return
        values, S = self.krylov.ritz()
        pick = wanted(values, self._k, self._which)
        inferred = self.krylov.residual_norm * S[-1, pick].abs()
        good = self._small(inferred, values[pick], self._inferred_tol)
        self._note = f"{int(good.sum())} of {self._k} converged"
        if last or (bool(good.all()) and self._complete(values[pick])):
            self._measure(values[pick], S[:, pick])
            self._measuring += self._k
            self.done_ = last or self.converged or m + 1 + self._measuring + self._k > self._products
            # Where they disagree the products are noisier than rounding; asking at every step would cost more than it tells.
            self._inferred_tol /= 10
            self._look_again = m + max(1, m // 4)

    def _complete(self, found: Tensor) -> bool:
        """Whether no further copy of a multiple eigenvalue can be among the wanted.

        Once a Krylov space is exhausted, the next run starts orthogonal to it and finds what is most extreme of the rest;
        it must have converged there, on nothing more extreme than the last of the wanted.
        """
        if self.krylov.newest == 0:
            return not self.krylov.exhausted
        values, S = torch.linalg.eigh(self.krylov.T[self.krylov.newest :, self.krylov.newest :])
        for extremity, there in _ends(found, self._which):
            best = extremity(values).argmax()
            residual = self.krylov.residual_norm * S[-1, best].abs()
            beyond = extremity(values[best]) > extremity(there).min() + self._floor()
            if beyond or not self._small(residual, values[best], self._inferred_tol):
                return False
        return True

    def _small(self, residuals: Tensor, values: Tensor, tol: float) -> Tensor:
        return residuals <= (max(tol, self._H.space.rounding) * values.abs()).clamp(min=self._floor())

    def _floor(self) -> float:
        """What the rounding of the vectors, not of the parameters, leaves of any residual."""
        return 10 * torch.finfo(self._H.dtype).eps * float(self.krylov.T.abs().max())

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
        self.vectors = V
        self.values, self.residuals = values, torch.cat(residuals)
        self.good = self._small(self.residuals, values, self._tol)
        self.converged = bool(self.good.all())
