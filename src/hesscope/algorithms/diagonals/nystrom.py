"""Hutchinson's estimator on what a low-rank approximation leaves, the approximation being made of the other probes.

With Q a Krylov basis (A Q known), P = I - Q Q^T, B = P A P, sign probes Z [n, m] and Y = B Z, Nystroem's approximation of B
is Y (Z^T Y)^-1 Y^T. For an indefinite B its middle matrix has eigenvalues near zero, so their inverse is damped:

    B_f = Y_f V diag(l / (l^2 + t^2)) V^T Y_f^T,     Z_f^T Y_f = V diag(l) V^T

The probes are split into folds; B_f is made of all probes but those of fold f, and t is chosen by holding out one more fold,
so that nothing depends on the probes it is tested with. Every probe z of fold f then gives an unbiased sample,

    diag(Q Q^T A + A Q Q^T - Q T Q^T) + diag(B_f) + z * (B - B_f) z,

whose variance is that of Hutchinson's estimator for B - B_f. Their mean is the estimate. Its error comes from the spread
within the folds: m - folds degrees of freedom. No product is spent that Hutchinson's estimator with deflation would not
spend. Leave-one-out estimates of a trace by Nystroem's approximation of a positive semidefinite matrix are XNysTrace's
(Epperly, Tropp and Webber, 2024); the damping, which admits indefinite matrices, and the folds are ours.

Shape legend: m probes, F folds; C = Z^T Y [m, m] float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.diagonals.deflated import BLOCK
from hesscope.algorithms.diagonals.estimate import Estimate, Limits, plus
from hesscope.algorithms.diagonals.scheduled import Scheduled, within_memory
from hesscope.algorithms.diagonals.subspace import Subspace
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.space import Space, Vectors, vectors

#: The share of the products that goes to the Krylov space. Between 0.2 and 0.5 it hardly matters.
SHARE = 0.3
#: With more folds each approximation is made of more probes, and the error has fewer degrees of freedom.
FOLDS = 10
#: Damping t tried, in units of the median |l|. Besides: no approximation at all.
DAMPING = (0.25, 0.5, 1.0, 2.0, 4.0)
#: Too few probes to approximate anything with.
FEWEST = 8
#: Probes between two steps of the Krylov space, at most.
_CHUNK = 8


class Nystrom(Scheduled):
    """Krylov directions and probes in a fixed proportion, all kept. A `space` made before costs nothing here."""

    def __init__(
        self, H: Operator, limits: Limits, seed: int, share: float = SHARE, space: Subspace | None = None
    ) -> None:
        # The basis with its products, or the probes' products with, while the estimate is made, residuals and signs.
        super().__init__(H, within_memory(H, "nystrom", limits, copies=4), seed)
        self._share, self._exhausted = share, False
        self._space = Subspace(H) if space is None else space
        self._AZ = H.space.zeros(0)

    @property
    def probes(self) -> int:
        return vectors.count(self._AZ)

    def advance(self) -> None:
        left = self._limits.products - self.spent
        due = self._space.q + BLOCK <= self._share * (self.spent + BLOCK + _CHUNK)
        if due and not self._exhausted:
            added = self._space.extend_krylov(min(BLOCK, left), self._seed, "krylov")
            self._exhausted = added == 0
            self.spent += added
            return
        m = self.probes
        chunk = min(chunk_size(self._H), left, _CHUNK)
        AZ = self._multiply(self._H.space.rademacher(self._seed, range(m, m + chunk)))
        self._AZ = {name: torch.cat([part, AZ[name]]) for name, part in self._AZ.items()}

    def compute(self) -> Estimate:
        m = self.probes
        Z = self._H.space.rademacher(self._seed, range(m))
        fit = crossfit(self._H.space, Z, self._space.residual(Z, self._AZ))
        record = {"directions": self._space.q, "probes": m, "folds": fit.folds, "damping": fit.damping}
        return Estimate("nystrom", plus(self._space.diagonal(), fit.values), fit.standard_error, m - fit.folds, record)

    def kept(self) -> dict[str, Any]:
        return {"space": self._space.state(), "exhausted": self._exhausted, "AZ": self._AZ}

    def restore_kept(self, state: dict[str, Any]) -> None:
        self._exhausted, self._AZ = state["exhausted"], self._H.space.place(state["AZ"])
        self._space.restore(state["space"])


class Fit:
    """What cross-fitting found: values and standard errors, folds, and the damping chosen by each (None: nothing)."""

    def __init__(self, folds: int, damping: list[float | None], values: Any, standard_error: Any) -> None:
        self.folds, self.damping = folds, damping
        self.values: dict[str, Tensor] = values
        self.standard_error: dict[str, Tensor] = standard_error


def crossfit(space: Space, Z: Vectors, Y: Vectors) -> Fit:
    """The diagonal of B from sign probes Z and Y = B Z, by the folds' approximations and what they leave."""
    m = vectors.count(Z)
    folds = min(FOLDS, m // 2) if m >= FEWEST else 1
    fold_of = torch.arange(m) % folds
    C = space.inner(Z, Y)
    C = 0.5 * (C + C.T)
    middle, damping = torch.zeros(m, m, dtype=torch.float64), []
    mean, squares = _zero(Y), _zero(Y)
    for f in range(folds):
        tests = fold_of == f
        M, chosen = torch.zeros(m, m, dtype=torch.float64), None
        if folds > 1:
            held_out = fold_of == (f + 1) % folds
            chosen = _choose(space, Z, Y, C, _Middle(C, ~tests & ~held_out), held_out)
            M = _Middle(C, ~tests).damped(chosen)
        samples = _samples(space, Z, Y, C, M, tests)
        share = vectors.count(samples) / m
        middle += share * M
        damping.append(chosen)
        for name, x in samples.items():
            center = x.mean(0)
            mean[name] += share * center
            squares[name] += (x - center).square().sum(0)
    values = {name: mean[name] + (part * Y[name]).sum(0) for name, part in space.combine(Y, middle).items()}
    degrees = m - folds
    scale = 1.0 / (m * degrees) if degrees > 0 else float("inf")
    error = {name: (s * scale).sqrt() if degrees > 0 else torch.full_like(s, scale) for name, s in squares.items()}
    return Fit(folds, damping, values, error)


def _samples(space: Space, Z: Vectors, Y: Vectors, C: Tensor, M: Tensor, tests: Tensor) -> Vectors:
    """z * (B - B_f) z for the tests' probes, with B_f z = Y M (Y^T z) and Y^T z a column of C."""
    predicted = space.combine(Y, M @ C[:, tests])
    return {name: Z[name][tests] * (Y[name][tests] - part) for name, part in predicted.items()}


class _Middle:
    """The middle matrix of the approximation that the training probes make, with zeros for the others: [m, m]."""

    def __init__(self, C: Tensor, train: Tensor) -> None:
        self._rows, self._m = train.nonzero()[:, 0], len(C)
        self._values, self._V = torch.linalg.eigh(C[self._rows][:, self._rows])
        magnitudes = self._values.abs()
        # Of a matrix of low rank most eigenvalues are rounding.
        self._scale, self._floor = float(magnitudes.median()), 1e-6 * float(magnitudes.max())

    def damped(self, damping: float | None) -> Tensor:
        """V diag(l / (l^2 + t^2)) V^T for t in units of the median |l|; zero for None."""
        M = torch.zeros(self._m, self._m, dtype=torch.float64)
        t = max((damping or 0.0) * self._scale, self._floor)
        if damping is not None and t > 0:
            weights = self._values / (self._values**2 + t**2)
            M[self._rows[:, None], self._rows] = (self._V * weights) @ self._V.T
        return M


def _choose(space: Space, Z: Vectors, Y: Vectors, C: Tensor, middle: _Middle, held_out: Tensor) -> float | None:
    """The damping whose approximation leaves the held-out probes' samples the least spread; None for no approximation."""
    spread = {}
    for damping in (None, *DAMPING):
        samples = _samples(space, Z, Y, C, middle.damped(damping), held_out)
        spread[damping] = deviations(space, samples)
    return min(spread, key=lambda damping: spread[damping])


def deviations(space: Space, samples: Vectors) -> float:
    """The samples' squared deviations from their mean, summed over all entries."""
    return float(space.total(lambda c: (samples[c.name] - samples[c.name].mean(0)).double().square().sum()))


def _zero(Y: Vectors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(part[0]) for name, part in Y.items()}
