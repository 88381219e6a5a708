"""XTrace and XNysTrace: every test vector serves the sketch and, left out of it, the estimate of what the sketch lacks.

(Epperly, Tropp and Webber, 2024.) Shape legend: n coordinates; k test vectors Omega [n, k], Gaussian; Y = A Omega = Q R
with Q [n, r] orthonormal and R [r, k]; W = Q^T Omega [r, k].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.basis import Basis, Home
from hesscope.algorithms.probing import require_finite
from hesscope.algorithms.traces.interface import TraceEstimator, mean_and_error
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.space import Vectors, vectors

#: Fewer test vectors than that do not decide when to stop.
_FEWEST_TO_STOP = 15
#: With a target the estimate is looked at whenever the test vectors have grown by so much.
_GROWTH = 1.15
#: A column of the sketch that has less of its own than so many roundings of the largest one has nothing of its own.
_OWN = 5.0
#: The regularisation of H, in roundings of it and in norms of what is not symmetric about it.
_ROUNDINGS, _NOISE = 10.0, 3.0
#: A positive semidefinite H has no eigenvalue below minus so many times its regularisation.
_NEGATIVE = 10.0


class Exchangeable(TraceEstimator):
    """k estimates est_i, each leaving one test vector out of the sketch; their mean is unbiased.

    The est_i share most of the sketch and so are not independent: std(est_i) / sqrt(k) is an indication that tends to be
    small. It is multiplied by `inflation`, which was measured; what rounding does to all of them alike, which their spread
    does not show, is added to it in quadrature.
    """

    #: Products a test vector.
    cost: int
    inflation: float

    def __init__(self, H: Operator, budget: int, target: float | None, seed: int) -> None:
        self._H, self._target, self._seed = H, target, seed
        self._most = min(budget // self.cost, H.space.size)
        self.expected = self.cost * self._most
        self.at_most = True
        self._Q = Basis(H.space, Home(), self._most)
        self._R = torch.zeros(0, 0, dtype=torch.float64)
        self._scale = 0.0
        self._estimates = torch.zeros(0, dtype=torch.float64)
        self._looked = 0
        self._alike = 0.0

    @property
    def samples(self) -> Tensor:
        return self._estimates

    @property
    def k(self) -> int:
        """Test vectors so far."""
        return self._R.shape[1]

    @property
    def done(self) -> bool:
        if self._looked < self.k or self.k == 0:
            return False
        mean, error = self.estimate()
        stop = self._target is not None and self.k >= _FEWEST_TO_STOP and error <= self._target * abs(mean)
        return self.k >= self._most or stop

    def estimate(self) -> tuple[float, float]:
        mean, error = mean_and_error(self._estimates)
        if self._H.space.size == 1 and self._looked == 1:
            return mean, 0.0  # whatever the vector, and no others to compare it with
        rounding = torch.finfo(self._H.dtype).eps * mean
        return mean, math.hypot(self.inflation * error, rounding, self._alike)

    def step(self) -> None:
        if self.k < self._goal():
            self._extend(min(self.k + chunk_size(self._H), self._goal()))
        if self.k >= self._goal():
            self._estimates, self._looked = self._leave_one_out(), self.k

    def _goal(self) -> int:
        """Test vectors at which the estimate is looked at next."""
        if self._target is None:
            return self._most
        return min(self._most, max(_FEWEST_TO_STOP, int(_GROWTH * self._looked) + 1))

    def _extend(self, stop: int) -> None:
        Y = self._product(self._omega(self.k, stop))
        self._scale = max(self._scale, float(self._H.space.norms(Y).max()))
        first = self._Q.m
        for i in range(vectors.count(Y)):
            self._take(vectors.columns(Y, i, i + 1))
        if self._Q.m > first:
            self._new_directions(first)

    def _take(self, y: Vectors) -> None:
        """One more column of R, and a row where y has a direction of its own."""
        r, k = self._R.shape
        coefficients = torch.zeros(0, 1, dtype=torch.float64)
        if self._Q.m:
            y, coefficients = self._Q.orthogonalise(y)
        norm = float(self._H.space.norms(y))
        fresh = norm > _OWN * torch.finfo(self._H.dtype).eps * self._scale
        R = torch.zeros(r + fresh, k + 1, dtype=torch.float64)
        R[:r, :k], R[:r, k:] = self._R, coefficients
        if fresh:
            R[r, k] = norm
            self._Q.append(vectors.scale(y, 1.0 / norm))
        self._R = R

    def _omega(self, start: int, stop: int) -> Vectors:
        return self._H.space.gaussian(self._seed, [f"trace/{i}" for i in range(start, stop)])

    def _blocks(self) -> list[tuple[int, int]]:
        step = chunk_size(self._H)
        return [(a, min(a + step, self.k)) for a in range(0, self.k, step)]

    def _W(self) -> Tensor:
        """Q^T Omega; the test vectors are drawn again rather than kept."""
        Q = self._H.space.place(self._Q.rows)
        return torch.cat([self._H.space.inner(Q, self._omega(a, b)) for a, b in self._blocks()], 1)

    def _product(self, V: Vectors) -> Vectors:
        AV = self._H.matmat(V)
        require_finite(self._H, AV)
        return AV

    def state(self) -> dict[str, Any]:
        return {"R": self._R, "scale": self._scale, "estimates": self._estimates, "looked": self._looked,
                "alike": self._alike, "basis": self._Q.rows}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self._R, self._scale = state["R"], state["scale"]
        self._estimates, self._looked, self._alike = state["estimates"], state["looked"], float(state["alike"])
        self._Q.restore(state["basis"])

    @abstractmethod
    def _new_directions(self, first: int) -> None:
        """Whatever is needed of the basis vectors from `first` on."""

    @abstractmethod
    def _leave_one_out(self) -> Tensor:
        """est_1..est_k."""


class XTrace(Exchangeable):
    """For any symmetric A, two products a test vector.

    With Q_i an orthonormal basis of Y without column i, Q_i Q_i^T = Q (I - s_i s_i^T) Q^T and s_i the i-th row of R^+,
    normalised; then, mu_i = (I - Q_i Q_i^T) omega_i being a Gaussian vector of the n - k + 1 dimensions left,

        est_i = tr(Q_i^T A Q_i) + (n - k + 1) <mu_i, A mu_i> / |mu_i|^2.
    """

    description, method = "trace, XTrace", "xtrace"
    cost = 2
    inflation = 1.3

    def __init__(self, H: Operator, budget: int, target: float | None, seed: int) -> None:
        super().__init__(H, budget, target, seed)
        self._core = torch.zeros(0, 0, dtype=torch.float64)

    def _new_directions(self, first: int) -> None:
        """Q^T A Q grows by the products with the new vectors."""
        space, m = self._H.space, self._Q.m
        Q = space.place(self._Q.rows)
        grown = torch.zeros(m, m, dtype=torch.float64)
        grown[:first, :first] = self._core
        new = space.inner(Q, self._product(vectors.columns(Q, first, m)))
        grown[:, first:], grown[first:, :first] = new, new[:first].T
        self._core = 0.5 * (grown + grown.T)

    def _leave_one_out(self) -> Tensor:
        n, (r, k), R, core = self._H.space.size, self._R.shape, self._R, self._core
        if r == 0:
            return torch.zeros(k, dtype=torch.float64)
        W = self._W()
        S, left = _left_out(R)
        X = W - S * (S * W).sum(0)  # coordinates of Q_i Q_i^T omega_i
        squares = torch.cat([self._H.space.norms(self._omega(a, b)) for a, b in self._blocks()]) ** 2
        quadratic = (W * R).sum(0) - 2 * (X * R).sum(0) + (X * (core @ X)).sum(0)
        rest = (squares - (X * X).sum(0)).clamp(min=1e-300)
        return core.trace() - (S * (core @ S)).sum(0) + (n - r + left) * quadratic / rest

    def state(self) -> dict[str, Any]:
        return super().state() | {"core": self._core}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._core = state["core"]


def _left_out(R_rk: Tensor) -> tuple[Tensor, Tensor]:
    """s_i as columns [r, k], and one where leaving column i out takes a dimension away; zeros where it does not.

    Column i takes one away if no combination of the columns that vanishes has it: e_i is in the range of R^T.
    """
    pinv = torch.linalg.pinv(R_rk, rtol=1e-13)
    own = ((pinv * R_rk.T).sum(1) - 1).abs() < 1e-6
    return torch.where(own, pinv.T / pinv.T.norm(dim=0).clamp(min=1e-300), 0.0), own.double()


class XNysTrace(Exchangeable):
    """For a positive semidefinite A, one product a test vector.

    With H = Omega^T A Omega, K = (H + delta I)^(-1) and the Nystrom approximation F = Y K Y^T, leaving test vector i out
    changes F by u_i u_i^T, u_i = Y K e_i / sqrt(K_ii), and <omega_i, (A - F_i) omega_i> = 1 / K_ii - delta:

        est_i = tr F - |u_i|^2 + (n - k + 1) G_ii (1 / K_ii - delta),   G = (Omega^T Omega)^(-1),

    for A - F_i vanishes on the other test vectors, and 1 / G_ii is the square of what is left of omega_i orthogonal to them.

    H is symmetric but for what rounding (of the model's own dtype, too) has done to the products: delta is three norms of
    (H - H^T) / 2, and ten roundings of H at least. Products with errors of s in the entries of H add s^2 tr K to tr F; that,
    with s^2 twice the mean square of (H - H^T) / 2, is what the error counts besides the spread of the est_i.
    """

    description, method = "trace, XNysTrace", "xnystrace"
    cost = 1
    inflation = 1.8

    def _new_directions(self, first: int) -> None:
        return None

    def _leave_one_out(self) -> Tensor:
        n, k, R = self._H.space.size, self.k, self._R
        if len(R) == 0:
            return torch.zeros(k, dtype=torch.float64)
        H = self._W().T @ R
        values, U = torch.linalg.eigh(0.5 * (H + H.T))
        odd = 0.5 * (H - H.T)
        rounding = _ROUNDINGS * torch.finfo(self._H.dtype).eps * float(values.abs().max())
        delta = max(rounding, _NOISE * float(torch.linalg.matrix_norm(odd, 2)))
        if float(values[0]) < -_NEGATIVE * delta:
            raise HesscopeError(
                f"Expected a positive semidefinite operator for XNysTrace, but a quadratic form of it came out at "
                f"{float(values[0]):.3g}, with others up to {float(values[-1]):.3g}; use method='xtrace'."
            )
        regular = values.clamp(min=0.0) + delta
        self._alike = 2 * float(odd.square().sum() / max(k * (k - 1), 1) * (1 / regular).sum())
        # R U before anything is divided: K itself, with entries up to 1 / delta, would drown the rest in rounding.
        RU, K_ii = R @ U, (U * U / regular).sum(1)
        RK, scale = (RU / regular) @ U.T, (n - k + 1) * torch.linalg.inv(self._gram()).diagonal()
        kept = (RU * RU / regular).sum() - (RK * RK).sum(0) / K_ii
        est: Tensor = kept + scale * (1 / K_ii - delta)
        return est

    def _gram(self) -> Tensor:
        """Omega^T Omega, from blocks drawn again."""
        rows = [
            torch.cat([self._H.space.inner(self._omega(a, b), self._omega(c, d)) for c, d in self._blocks()], 1)
            for a, b in self._blocks()
        ]
        return torch.cat(rows)
