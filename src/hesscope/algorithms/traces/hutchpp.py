"""Hutch++: a trace exact on a random sketch's range, and Hutchinson's estimator on the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.basis import Basis, Home
from hesscope.algorithms.budget import FEWEST_PROBES, probes_for
from hesscope.algorithms.probing import require_finite
from hesscope.algorithms.traces.interface import TraceEstimator, as_samples, mean_and_error
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.space import Vectors, vectors


class HutchPlusPlus(TraceEstimator):
    """tr(Q^T A Q) + mean of (n - k) <g_i, A g_i> / <g_i, g_i>, Q [n, k] an orthonormal basis of A S (Meyer et al., 2021).

    A third of the products makes the sketch A S of sign vectors S, a third the exact part A Q, and the rest go to Gaussian
    g_i projected off Q, whose directions are uniform there: the estimate is unbiased, and exact on the identity. (Projected
    sign vectors have a few lengths only; two that agree by chance would state no error at all.) The g_i are independent of
    Q, so the samples' standard error is that of the estimate. With a target error, g_i are added until it is met; directions that the sketch lacks cost nothing.
    """

    description, method = "trace, Hutch++", "hutch++"

    def __init__(self, H: Operator, budget: int, sketch: int, target: float | None, seed: int) -> None:
        self._H, self._sketch, self._target, self._seed = H, sketch, target, seed
        self.expected = self._most = budget
        self.at_most = target is not None
        self._Q = Basis(H.space, Home(), sketch)
        self._spent, self._sketched, self._exact = 0, 0, 0.0
        self._measured = 0
        self._scale = 0.0
        self._values: list[float] = []

    @property
    def samples(self) -> Tensor:
        return self._exact + as_samples(self._values)

    @property
    def done(self) -> bool:
        m = len(self._values)
        if self._spent >= self._most:
            return True
        mean, error = self.estimate()
        return self._target is not None and m >= FEWEST_PROBES and error <= self._target * abs(mean)

    def estimate(self) -> tuple[float, float]:
        return mean_and_error(self.samples)

    def step(self) -> None:
        if self._sketched < self._sketch:
            self._extend_sketch()
        elif self._measured < self._Q.m:
            self._measure_sketch()
        else:
            self._probe()

    def _extend_sketch(self) -> None:
        stop = min(self._sketched + chunk_size(self._H), self._sketch)
        Y = self._product(self._H.space.rademacher(self._seed, [f"sketch/{i}" for i in range(self._sketched, stop)]))
        self._sketched = stop
        norms = self._H.space.norms(Y)
        self._scale = max(self._scale, float(norms.max()))
        for k in range(vectors.count(Y)):
            y = self._Q.orthogonalise(vectors.columns(Y, k, k + 1))[0]
            norm = float(self._H.space.norms(y))
            # What is left of a vector inside the span is rounding, and no direction.
            if norm > 100 * torch.finfo(self._H.dtype).eps * self._scale:
                self._Q.append(vectors.scale(y, 1.0 / norm))

    def _measure_sketch(self) -> None:
        stop = min(self._measured + chunk_size(self._H), self._Q.m)
        Q = self._H.space.place(vectors.columns(self._Q.rows, self._measured, stop))
        self._exact += float(self._H.space.inner(Q, self._product(Q)).diagonal().sum())
        self._measured = stop

    def _probe(self) -> None:
        m, sequential = len(self._values), self._target is not None
        stop = m + min(1 if sequential else chunk_size(self._H), self._most - self._spent)
        G = self._H.space.gaussian(self._seed, range(m, stop))
        if self._Q.m:
            G = self._Q.orthogonalise(G)[0]
        left = self._H.space.size - self._Q.m
        squares = (self._H.space.norms(G) ** 2).clamp(min=torch.finfo(self._H.dtype).tiny)
        self._values += (left * self._H.space.inner(G, self._product(G)).diagonal() / squares).tolist()
        if self._target is not None and len(self._values) >= FEWEST_PROBES:
            mean, error = self.estimate()
            before, most = self._spent - len(self._values), self._most
            self.expected = min(most, before + probes_for(len(self._values), error, self._target * abs(mean), most))
            self.at_most = False

    def _product(self, V: Vectors) -> Vectors:
        AV = self._H.matmat(V)
        require_finite(self._H, AV)
        self._spent += vectors.count(V)
        return AV

    def state(self) -> dict[str, Any]:
        return {"spent": self._spent, "sketched": self._sketched, "exact": self._exact, "measured": self._measured,
                "scale": self._scale, "samples": self._values, "basis": self._Q.rows}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self._spent, self._sketched, self._exact = state["spent"], state["sketched"], state["exact"]
        self._measured, self._scale, self._values = state["measured"], state["scale"], state["samples"]
        self._Q.restore(state["basis"])
