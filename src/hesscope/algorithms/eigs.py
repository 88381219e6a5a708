"""Extreme eigenpairs by the Lanczos process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.basis import Home
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.emergence import needed, points, ratios
from hesscope.algorithms.krylov import Krylov
from hesscope.algorithms.power import power
from hesscope.algorithms.probing import require_finite
from hesscope.algorithms.starting import start_digest, start_vectors, warm_start
from hesscope.algorithms.wanted import WHICH, ends, wanted, worth_keeping
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.operators import Operator
from hesscope.operators.free import vectors_that_fit
from hesscope.results import Eigenpairs
from hesscope.space import Vectors, vectors

_METHODS = ("lanczos", "power")
_DEFAULT_STEPS = 300
#: Of the tolerance, what a search may use up where rounding of the basis will add its own.
_BEFORE_ROUNDING = 0.8


def eigs(
    H: Operator,
    k: int = 6,
    which: str = "LM",
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    start: Eigenpairs | Tensor | dict[str, Tensor] | None = None,
    max_basis: int | None = None,
    basis_device: str | torch.device | None = None,
    basis_folder: str | Path | None = None,
    basis_dtype: str | torch.dtype | None = None,
    method: str = "lanczos",
    momentum: float | str = 0.0,
    batches: int | None = None,
    gather: bool = True,
) -> Eigenpairs:
    """The k most extreme eigenpairs, by Lanczos with full reorthogonalisation and thick restarts, or by power iteration.

    Args:
        k: how many, 1 to n.
        which: as in SciPy's `eigsh`: "LM" largest magnitude, "LA" largest, "SA" smallest (most negative), "BE" half from
            each end, the odd one from the upper.
        tol: each |A v - lambda v| is to be at most tol |lambda|, or what rounding allows: the parameters' (relative to
            lambda) and the vectors' (relative to the operator).
        max_products: at most so many; 300 by default, or 20 k where that is more.
        seed: of the start vector; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.
        start: where to begin: an earlier result on the same selection, such as the previous checkpoint's, or vectors
            [n], [n, j] or {name: tensor}. A random vector of the same length is added, and the search goes on until an
            eigenvalue that these vectors lack would have been seen: in 432 searches for a new extreme one
            it missed none, where a search from random missed 24 (3% beyond a known one, at tol=0.02). The power method
            does not do that: from `start` it may settle on a pair that is no longer the largest.
        max_basis: vectors kept at most, k + 2 or more: a full basis restarts from its best Ritz vectors. By default what
            half of the free memory (or disk) holds.
        basis_device: keep the basis there, such as "cpu"; where the parameters are by default.
        basis_folder: keep the basis in files of this folder, mapped into memory; they vanish with the run.
        basis_dtype: "float16" or "bfloat16" keeps the basis rounded to that, in half of float32's memory, and measures the
            residuals of what was found by k products more. Rounding leaves relative residuals of a few 1e-4 (float16) or
            1e-3 (bfloat16), more after many restarts: a `tol` below that is not met.
        method: "lanczos", or "power": power iteration with deflation, one pair after the other, for "LM" only.
        momentum: for the power method: 0 is the plain form, "auto" or a number beta the accelerated one.
        batches: for the power method: its stochastic form, every product on so many batches, drawn anew.
        gather: where vectors are divided among ranks, every rank gets all eigenvectors; with False its own rows of them, and
            `save`, which then all ranks call, has rank 0 write them a piece at a time.

    Returns:
        Eigenvalues in the order wanted (by magnitude for "LM", descending for "LA" and "BE", ascending for "SA"), unit
        eigenvectors, and residuals |A v - lambda v| measured on the products that were made. Where these miss `tol`, or the
        products do not suffice to see what `start` lacks, `converged` is False and a HesscopeWarning says so. One start vector
        sees one copy of a multiple eigenvalue until its space is exhausted; from then on every copy is found. Of eigenvalues
        that differ by much less than `tol` times their size it may show one for all: ask for a smaller `tol` to tell them apart.

    Raises:
        HesscopeError: k outside 1..n, an unknown `which` or `method`, too few products or too small a basis for k pairs, an
            option of the other method.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.eigs(hs.operator(torch.diag(torch.tensor([3.0, -5.0, 1.0]).double())), k=2).eigenvalues.round(decimals=6)
        tensor([-5.,  3.], dtype=torch.float64)
    """
    _require(H, k, which, tol, max_products, method)
    seed = run_seed(seed, checkpoint, H.comm)
    given = start_vectors(H, start)
    options: dict[str, Any] = {"k": k, "which": which, "tol": tol, "max_products": max_products, "seed": seed}
    options |= {"method": method, "start": start_digest(H, given)}
    if method == "power":
        if which != "LM" or any(x is not None for x in (max_basis, basis_device, basis_folder, basis_dtype)):
            raise HesscopeError(
                "Expected which='LM' and none of max_basis, basis_device, basis_folder and basis_dtype with method='power', "
                "which keeps no basis; use method='lanczos'."
            )
        return _told(power(H, k, tol, max_products, seed, checkpoint, given, momentum, batches, options, gather))
    if momentum != 0 or batches is not None:
        raise HesscopeError("Expected momentum and batches only with method='power', got them with method='lanczos'.")
    home = Home.of(basis_device, basis_folder, basis_dtype)
    products = max(_DEFAULT_STEPS, 20 * k) if max_products is None else max_products
    if home.dtype is not None and products < 2 * k:
        raise HesscopeError(
            f"Expected max_products of at least {2 * k} for {k} pairs with basis_dtype={str(basis_dtype)!r}, "
            f"whose residuals take {k}, got {products}."
        )
    search = Search(H, k, which, tol, products, basis_capacity(H, k, max_basis, home), seed, given, home)
    options |= {"max_basis": max_basis, "basis_dtype": None if basis_dtype is None else str(basis_dtype)}
    spent = drive(H, search, options, checkpoint)
    pairs = Eigenpairs(
            **spent,
            which=which,
            eigenvalues=search.values,
            vectors=H.space.kept(search.vectors(), gather),
            residuals=search.residuals,
            tol=tol,
            converged=search.converged,
            steps=search.steps,
            seed=seed,
            method="lanczos",
            eigenvalue_standard_error=torch.zeros(k, dtype=torch.float64),
        )  # fmt: skip
    return _told(pairs)


def _told(pairs: Eigenpairs) -> Eigenpairs:
    """The pairs; with a warning where some missed the tolerance."""
    if not pairs.converged:
        missed = int((pairs.residuals > pairs.tol * pairs.eigenvalues.abs()).sum())
        if missed == 0:
            warnings.warn(
                f"All {len(pairs.residuals)} eigenpairs meet tol={pairs.tol:g}, but after {pairs.products} products from start "
                "vectors a more extreme eigenvalue that these lack may still be hidden; allow more with max_products.",
                HesscopeWarning,
                stacklevel=3,
            )
            return pairs
        rounded = pairs.provenance["options"].get("basis_dtype") is not None
        warnings.warn(
            f"{missed} of {len(pairs.residuals)} eigenpairs missed tol={pairs.tol:g} after {pairs.products} products; "
            "their measured residuals are in the result; allow more with max_products"
            + (", or leave basis_dtype out: rounding may be what is left." if rounded else "."),
            HesscopeWarning,
            stacklevel=3,
        )
    return pairs


def _require(H: Operator, k: int, which: str, tol: float, max_products: int | None, method: str) -> None:
    n = H.space.size
    if not 1 <= k <= n:
        raise HesscopeError(f"Expected k between 1 and {n}, the number of coordinates, got {k}.")
    if which not in WHICH:
        raise HesscopeError(f"Expected which to be one of {', '.join(WHICH)}, got {which!r}.")
    if not tol > 0:
        raise HesscopeError(f"Expected tol to be positive, got {tol}.")
    if max_products is not None and max_products < k:
        raise HesscopeError(f"Expected max_products of at least {k} for {k} pairs, got {max_products}.")
    if method not in _METHODS:
        raise HesscopeError(f"Expected method to be one of {', '.join(_METHODS)}, got {method!r}.")


def basis_capacity(H: Operator, k: int, max_basis: int | None, home: Home) -> int:
    """Vectors that the basis may have."""
    n, least = H.space.size, min(k + 2, H.space.size)
    if max_basis is not None and max_basis < least:
        raise HesscopeError(f"Expected max_basis of at least {least} for {k} pairs, got {max_basis}.")
    fits = vectors_that_fit(H.comm, H.space, home.itemsize(H.space), home.device, home.folder) // 2
    if fits < least:
        raise HesscopeError(
            f"Expected room for a basis of {least} vectors of {n} coordinates; only {fits} fit. Try basis_device='cpu', "
            "basis_folder=, a smaller k or fewer coordinates."
        )
    return min(n, fits, max_basis or n)


#: What a search knows beside its Krylov run; capacity and products because they may come from the memory that was free.
_COUNTERS = ("_capacity", "expected", "_most", "steps", "_found", "_left", "_note", "_raised", "_kept", "_hidden")
#: What its last look found.
_FOUND = ("values", "residuals", "good", "converged", "_S")


class Search(Iteration):
    """Lanczos until the measured residuals are small; a basis that is full restarts.

    The residuals come from the products of the steps, except where the basis was rounded: then the search goes on to 0.8 of
    the tolerance, and a product more for each pair measures them.
    """

    description = "eigenpairs"
    at_most = True

    def __init__(
        self, H: Operator, k: int, which: str, tol: float, products: int, capacity: int, seed: int,
        given: Vectors | None, home: Home,
    ) -> None:  # fmt: skip
        self._H, self._k, self._which, self._tol = H, k, which, tol
        self._capacity, self.steps, self._left = capacity, 0, k if home.dtype is not None else 0
        self._most = products - self._left if capacity < H.space.size else min(products - self._left, capacity)
        self.expected = self._most + self._left
        first, self._warm = warm_start(H, given, seed), given is not None
        self.krylov = Krylov(H, first, seed, restart=True, capacity=min(capacity, products), home=home)
        self._found = False
        self._raised, self._kept, self._hidden = 0.0, 0, False
        self._note = ""

    @property
    def done(self) -> bool:
        return self._found and self._left == 0

    def note(self) -> str:
        return self._note

    def vectors(self) -> Vectors:
        """The unit eigenvectors."""
        return self.krylov.combine(self._S)

    def state(self) -> dict[str, Any]:
        names = [*_COUNTERS, *(_FOUND if self._found else ())]
        return {"krylov": self.krylov.state(), **{name: getattr(self, name) for name in names}}

    def restore(self, state: dict[str, Any]) -> None:
        self.krylov.restore(state.pop("krylov"))
        for name, value in state.items():
            setattr(self, name, value)

    def step(self) -> None:
        if self._found:
            self._measure(self._left - 1)
            return
        if self.krylov.m == self._capacity:
            self._restart()
        self.krylov.step()
        self.steps += 1
        m, full = self.krylov.m, self.krylov.m == self._capacity
        last = self.steps == self._most or self.krylov.ended
        if m < self._k or (m > 50 and m % 5 and not last and not full):
            return
        values, S = self.krylov.ritz()
        pick = wanted(values, self._k, self._which)
        self.values, self._S = values[pick], S[:, pick]
        self.residuals = self.krylov.residuals(self.values, self._S)
        self.good = self._small(self.residuals, self.values, _BEFORE_ROUNDING if self._left else 1.0)
        self._note = f"{int(self.good.sum())} of {self._k} converged"
        self.converged = bool(self.good.all())
        self._hidden = self.converged and not self.krylov.ended and self._premature(values, S)
        self._found = last or (self.converged and self._complete(self.values) and not self._hidden)
        self.converged = self.converged and not (last and self._hidden)

    def _measure(self, i: int) -> None:
        """One product: the Rayleigh quotient and the residual of the i-th vector as it will be returned."""
        v = self.krylov.combine(self._S[:, i : i + 1])
        w = self._H.matmat(v)
        require_finite(self._H, w)
        self.values[i] = self._H.space.inner(v, w)[0, 0]
        self.residuals[i] = self._H.space.norms(vectors.add(w, v, -float(self.values[i])))[0]
        self._left = i
        self.good = self._small(self.residuals, self.values)
        self.converged = bool(self.good.all()) and not self._hidden

    def _restart(self) -> None:
        values, S = self.krylov.ritz()
        pick = wanted(values, self._k, self._which)
        unconverged = pick[~self._small(self.krylov.residuals(values[pick], S[:, pick]), values[pick])]
        most = self._capacity - 2
        if self._warm and self.krylov.newest == 0:
            there = points(values[pick], self._which, self._tol)
            self._raised += ratios(self.krylov, values, S, there, self._kept)[1]
        self.krylov.restart(values, S, worth_keeping(values, self._k, self._which, unconverged, most))
        self._kept = self.krylov.m

    def _complete(self, found: Tensor) -> bool:
        """Whether no further copy of a multiple eigenvalue can be among the wanted.

        Once a Krylov space is exhausted, the next run starts orthogonal to it and finds what is most extreme of the rest;
        it must have converged there, on nothing more extreme than the last of the wanted.
        """
        if self.krylov.newest == 0:
            return not self.krylov.exhausted
        values, S = torch.linalg.eigh(self.krylov.T[self.krylov.newest :, self.krylov.newest :])
        for extremity, there in ends(found, self._which):
            best = extremity(values).argmax()
            residual = self.krylov.residual_norm * S[-1, best].abs()
            beyond = extremity(values[best]) > extremity(there).min() + self._floor()
            if beyond or not self._small(residual, values[best]):
                return False
        return True

    def _premature(self, values: Tensor, S: Tensor) -> bool:
        """Whether an eigenvalue may still hide from a warm start; none does once a Krylov space is exhausted."""
        if not self._warm or self.krylov.newest > 0:
            return False
        there = points(self.values, self._which, self._tol)
        return self._raised + ratios(self.krylov, values, S, there, self._kept)[0] < needed(self._H.space.size)

    def _small(self, residuals: Tensor, values: Tensor, share: float = 1.0) -> Tensor:
        return residuals <= (max(share * self._tol, self._H.space.rounding) * values.abs()).clamp(min=self._floor())

    def _floor(self) -> float:
        """What the rounding of the vectors, not of the parameters, leaves of any residual."""
        return 10 * torch.finfo(self._H.dtype).eps * float(self.krylov.T.abs().max())
