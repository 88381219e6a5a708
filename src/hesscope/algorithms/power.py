"""Power iteration with deflation: plain, accelerated by momentum, and stochastic on resampled batches.

    v_(t+1) = (I - V V^T) A v_t - beta v_(t-1),   normalised,

V holding the pairs found before (Mises and Pollaczek-Geiringer, 1929; momentum: Xu, He, De Sa, Mitliagkas and Re, 2018).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.basis import Basis, Home
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.probing import require_finite
from hesscope.algorithms.starting import unit_columns
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import Eigenpairs
from hesscope.space import Vectors, vectors

_PRODUCTS_A_PAIR = 300
#: Steps between two looks at how fast the residual falls, from which "auto" takes its momentum.
_WINDOW = 10
#: The part of a pair's products that measures its Rayleigh quotient, in the stochastic form.
_MEASURING = 0.2
_FEWEST_SAMPLES = 5


def power(
    H: Operator, k: int, tol: float, max_products: int | None, seed: int, checkpoint: str | Path | Checkpoint | None,
    given: Vectors | None, momentum: float | str, batches: int | None, options: dict[str, Any], gather: bool,
) -> Eigenpairs:  # fmt: skip
    """`eigs(method="power")`: the k pairs of largest magnitude, one after the other; see there for the arguments.

    The plain form converges by |lambda_2 / lambda_1| a product, the accelerated one with beta = lambda_2^2 / 4 by about
    the same at the square root of the gap. Neither tells lambda from -lambda apart where both are eigenvalues.

    Pairs found one after the other are coupled by their errors, so at the end the projection onto all of them is
    diagonalised (Rayleigh and Ritz) on the products that were made last; values and residuals are those after it.

    The stochastic form, with `batches`, takes every product over so many batches, drawn anew without replacement: an
    unbiased product. Its iterate settles in a ball of noise. Then the quotients <v, A_r v> of the fixed v over fresh
    draws r = 1..R, independent of v, are averaged: an unbiased Rayleigh quotient, with the standard error of the mean. The
    residual is that of the averaged product, its noise included.
    """
    if momentum != "auto" and (isinstance(momentum, str) or not 0 <= momentum < math.inf):
        raise HesscopeError(f"Expected momentum to be 'auto' or a number, 0 or more, got {momentum!r}.")
    most = _PRODUCTS_A_PAIR * k if max_products is None else max_products
    options = options | {"momentum": momentum, "batches": batches}
    run: _Power
    if batches is None:
        run = _Deterministic(H, k, tol, most, seed, given, momentum)
    else:
        run = _Stochastic(H, k, tol, most, seed, given, momentum, batches)
    spent = drive(H, run, options, checkpoint)
    values, residuals, found = run.pairs()
    errors = torch.tensor(run.errors, dtype=torch.float64)
    order = values.abs().argsort(descending=True, stable=True)
    good = (residuals <= torch.clamp(max(tol, H.space.rounding) * values.abs(), min=run.floor))[order]
    return Eigenpairs(**spent, which="LM", eigenvalues=values[order], vectors=H.space.kept(H.space.combine(found, torch.eye(k, dtype=torch.float64)[:, order]), gather), tol=tol,
                      residuals=residuals[order], converged=bool(good.all()), steps=run.made, seed=seed, method="power",
                      eigenvalue_standard_error=errors[order], degrees_of_freedom=run.degrees)  # fmt: skip


class _Power(Iteration):
    """What the forms share: the pairs found so far, and the iterate of the next."""

    description = "power iteration"
    at_most = True
    degrees = 0

    def __init__(self, H: Operator, k: int, tol: float, most: int, seed: int, given: Vectors | None) -> None:
        self._H, self._k, self._tol, self._seed, self._given = H, k, tol, seed, given
        self.expected, self.made, self.floor = most, 0, 0.0
        self.values: list[float] = []
        self.residuals: list[float] = []
        self.errors: list[float] = []
        self._V = Basis(H.space, Home(), k)
        self._begin()

    @property
    def done(self) -> bool:
        return len(self.values) == self._k

    def note(self) -> str:
        return f"pair {min(len(self.values) + 1, self._k)} of {self._k}"

    def pairs(self) -> tuple[Tensor, Tensor, Vectors]:
        """Eigenvalues, residuals and unit vectors."""
        values, residuals = (torch.tensor(x, dtype=torch.float64) for x in (self.values, self.residuals))
        return values, residuals, self._V.rows

    def state(self) -> dict[str, Any]:
        return {"made": self.made, "floor": self.floor, "values": self.values, "residuals": self.residuals,
                "errors": self.errors, "found": self._V.rows, "v": self._v, "before": self._before, "beta": self._beta,
                "history": self._history}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.made, self.floor, self._beta = state["made"], state["floor"], state["beta"]
        self.values, self.residuals, self.errors = state["values"], state["residuals"], state["errors"]
        self._v, self._before = self._H.space.place(state["v"]), self._H.space.place(state["before"])
        self._history = state["history"]
        self._V.restore(state["found"])

    def _begin(self) -> None:
        """The next pair's first iterate: the next of the given vectors, or a random one, orthogonal to those found."""
        i, v = len(self.values), None
        if self._given is not None and i < vectors.count(self._given):
            v = self._deflated(vectors.columns(self._given, i, i + 1))
        if v is None or float(self._H.space.norms(v)) == 0:
            v = self._deflated(self._H.space.gaussian(self._seed, [f"power/{i}"]))
        self._v = unit_columns(self._H, v)
        self._before = self._H.space.zeros()
        self._beta, self._history = 0.0, list[float]()

    def _advance(self, w: Vectors) -> None:
        """The next iterate from w = A v; both iterates are scaled alike."""
        new = self._deflated(w)
        if self._beta:
            new = vectors.add(new, self._before, -self._beta)
        norm = float(self._H.space.norms(new))
        if norm > 0:  # zero where A has nothing left; v is then an eigenvector of eigenvalue zero
            self._before, self._v = vectors.scale(self._v, 1.0 / norm), vectors.scale(new, 1.0 / norm)

    def _accept(self, value: float, residual: float, error: float) -> None:
        self._V.append(self._v)
        self.values.append(value)
        self.residuals.append(residual)
        self.errors.append(error)
        if not self.done:
            self._begin()

    def _deflated(self, w: Vectors) -> Vectors:
        return self._V.orthogonalise(w)[0] if self._V.m else w


class _Deterministic(_Power):
    """A residual with every product, since that is A v; what couples it to the pairs found before is left to the end."""

    def __init__(
        self, H: Operator, k: int, tol: float, most: int, seed: int, given: Vectors | None, momentum: float | str
    ) -> None:
        self._momentum = momentum
        self._AV = H.space.zeros(k)
        super().__init__(H, k, tol, most, seed, given)

    def state(self) -> dict[str, Any]:
        return super().state() | {"products": self._AV}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._AV = self._H.space.place(state["products"])

    def pairs(self) -> tuple[Tensor, Tensor, Vectors]:
        space, V = self._H.space, self._V.rows
        inner = space.inner(V, self._AV)
        values, S = torch.linalg.eigh(0.5 * (inner + inner.T))
        V = space.combine(V, S)
        left = vectors.add(space.combine(self._AV, S), space.combine(V, torch.diag(values)), -1.0)
        return values, space.norms(left), V

    def step(self) -> None:
        space, v = self._H.space, unit_columns(self._H, self._v)
        w = self._H.matmat(v)
        require_finite(self._H, w)
        self.made += 1
        value = float(space.inner(v, w))
        residual = float(space.norms(self._deflated(vectors.add(w, v, -value))))
        self.floor = max(self.floor, 10 * torch.finfo(self._H.dtype).eps * float(space.norms(w)))
        # At the end k pairs may mix, where an eigenvalue is multiple: their residuals then add up to sqrt(k) times one.
        small = residual <= max(max(self._tol, self._H.space.rounding) * abs(value), self.floor) / self._k**0.5
        if small or self.made + self._k - len(self.values) - 1 >= self.expected:
            self._v = v
            for name, part in w.items():
                self._AV[name][len(self.values)] = part[0]
            return self._accept(value, residual, 0.0)
        self._history.append(residual / (abs(value) or 1.0))
        if self._momentum != "auto":
            self._beta = float(self._momentum)
        elif len(self._history) % _WINDOW == 0 and len(self._history) >= 2 * _WINDOW:
            rate = (self._history[-1] / self._history[-_WINDOW]) ** (1 / (_WINDOW - 1))
            self._beta = momentum_for(abs(value), rate, self._beta)
        self._advance(w)
        return None


def momentum_for(first: float, rate: float, beta: float) -> float:
    """beta = lambda_2^2 / 4 from the rate at which the residual falls under the present beta.

    The iterate's part along lambda grows by s(lambda) = (lambda + sqrt(lambda^2 - 4 beta)) / 2, so x = rate * s(lambda_1)
    is s(lambda_2), and lambda_2 = x + beta / x. Parts below 2 sqrt(beta) all grow by sqrt(beta): then lambda_2 is no larger
    than that, and beta stays.
    """
    x = min(rate, 1.0) * (first + max(first**2 - 4 * beta, 0.0) ** 0.5) / 2
    if x <= 1.001 * beta**0.5:
        return beta
    second = min(x + beta / x, 0.9999 * first)
    return float(second**2 / 4)


class _Stochastic(_Power):
    """Products over fresh batches; a fixed number a pair, the last fifth of them for the Rayleigh quotient."""

    at_most = False

    def __init__(
        self, H: Operator, k: int, tol: float, most: int, seed: int, given: Vectors | None, momentum: float | str,
        batches: int,
    ) -> None:  # fmt: skip
        if momentum == "auto":
            raise HesscopeError("Expected momentum to be a number with batches=, for their noise hides the rate.")
        H.sampled(batches, seed, 0)  # refuses what cannot be resampled, before any work
        self._batches, self._momentum = batches, float(momentum)
        each = most // k
        self._samples = max(_FEWEST_SAMPLES, round(_MEASURING * each))
        self._iterations = each - self._samples
        if self._iterations < 1:
            raise HesscopeError(
                f"Expected max_products of at least {k * (_FEWEST_SAMPLES + 1)} for {k} pairs of stochastic power "
                f"iteration, got {most}."
            )
        self._quotients: list[float] = []
        self._mean = H.space.zeros()
        super().__init__(H, k, tol, k * each, seed, given)
        self.degrees = self._samples - 1

    def state(self) -> dict[str, Any]:
        return super().state() | {"quotients": self._quotients, "mean": self._mean}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._quotients, self._mean = state["quotients"], self._H.space.place(state["mean"])

    def step(self) -> None:
        space, v = self._H.space, unit_columns(self._H, self._v)
        w = self._H.sampled(self._batches, self._seed, self.made).matmat(v)
        require_finite(self._H, w)
        measuring = self.made % (self._iterations + self._samples) >= self._iterations
        self.made += 1
        if not measuring:
            self._beta = self._momentum
            return self._advance(w)
        self._v = v
        self._quotients.append(float(space.inner(v, w)))
        vectors.add_(self._mean, w, 1.0 / self._samples)
        if len(self._quotients) == self._samples:
            quotients = torch.tensor(self._quotients, dtype=torch.float64)
            value = float(quotients.mean())
            residual = float(space.norms(vectors.add(self._mean, v, -value)))
            self._quotients, self._mean = [], space.zeros()
            self._accept(value, residual, float(quotients.std()) / self._samples**0.5)
        return None
