"""Central finite differences of the gradient, with an error estimate from two step sizes.

    H v ~ (g(theta + h v) - g(theta - h v)) / 2h,    h = (3 eps)^(1/3) * (1 + |theta| / sqrt(p)) / |v|

with theta the p entries of the parameters that are selected from (Dennis and Schnabel, 1983, section 5.4, without their
scaling by coordinate). The product reported is Richardson's
extrapolation of steps h and 2h, and twice their difference estimates its error. Where rounding dominates, the finer quotient
carries r of it and the coarser r / 2, so that the extrapolation errs by 1.3 r and the two differ by 1.1 r. The error stated is
relative to the operator, not to each product, for a product that vanishes is all rounding:

    error = max of 2 |D(h) - D(2h)| / |v| over the v so far  /  max of |Hv| / |v| over these and a random one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscope.engines.base import Engine, Linearization, gradient_parts, parameter_values
from hesscope.losses import head_loss, head_note
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors


class FiniteDifference(Engine):
    """Four gradients a product: when nothing else runs, and as a check of everything else."""

    name = "finite-difference"
    build_units = 0.0
    product_units = 12.0

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        return _Differences(problem, b, space)


class _Differences(Linearization):
    gradient_units = 3.0

    def __init__(self, problem: Problem, b: int, space: Space) -> None:
        self._problem, self._b, self._space = problem, b, space
        self._loss = head_loss(problem.loss)
        self._values = parameter_values(problem, space)
        self.bytes = 0
        with torch.no_grad():
            self.total = float(problem.total(b, loss=self._loss)[0])
        self.head = head_note(self._loss)
        #: The largest estimated error of a product so far, and the largest product, of a vector of length one.
        self._missed, self._largest = 0.0, 0.0
        self._eps: float | None = None
        self._used: set[str] | None = None

    @property
    def error(self) -> float:  # type: ignore[override]
        """The largest estimated error of a product so far, relative to the largest product, both of unit vectors."""
        return self._missed / self._largest if self._largest > 0 else 0.0

    @property
    def unused(self) -> list[str]:  # type: ignore[override]
        """What no gradient so far depends on; one where there was none yet, for a vector of zeros needs none."""
        if self._used is None:
            self._gradient(self._values)
        return [name for name in self._space.names if name not in (self._used or ())]

    def gradient(self) -> Vectors:
        return self._gradient(self._values)

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        for k in range(vectors.count(V)):
            vectors.add_(vectors.columns(into, k, k + 1), self._column(vectors.columns(V, k, k + 1)))

    def _column(self, v: Vectors) -> Vectors:
        length = float(self._space.norms(v))
        if length == 0.0:
            return self._space.zeros()
        if self._eps is None:
            self._eps = self._chosen_eps()
        best, missed = self._extrapolated(v, self._step(self._eps) / length)
        self._missed = max(self._missed, missed / length)
        self._largest = max(self._largest, float(self._space.norms(best)) / length)
        return best

    def _chosen_eps(self) -> float:
        """The rounding that the step is for; what products are like is first seen here."""
        # A float64 model may still cast to float32 inside; then the step for float64 drowns in rounding. Told by a vector of
        # its own, so that a product does not depend on which came first. One of signs may be what products vanish along, such
        # as a shift of all biases before a normalisation; then one of normal numbers tells.
        candidates = {max(torch.finfo(p.dtype).eps for p in self._values.values()), torch.finfo(torch.float32).eps}
        for z in (self._space.rademacher(0, ["step"]), self._space.gaussian(0, ["step"])):
            size = float(self._space.norms(z))
            found = {eps: self._extrapolated(z, self._step(eps) / size) for eps in sorted(candidates)}
            eps = min(found, key=lambda eps: found[eps][1])
            self._largest = float(self._space.norms(found[eps][0])) / size
            if self._largest > found[eps][1] / size:
                break
        return eps

    def _extrapolated(self, v: Vectors, step: float) -> tuple[Vectors, float]:
        """Richardson's extrapolation of steps h and 2h, and twice the distance between the two."""
        fine, coarse = self._quotient(v, step), self._quotient(v, 2 * step)
        best = vectors.add(vectors.scale(fine, 4 / 3), coarse, -1 / 3)
        return best, 2 * float(self._space.norms(vectors.add(fine, coarse, -1.0)))

    def _step(self, eps: float) -> float:
        """Balances the rounding of gradients (eps / h) against the cubic term (h^2)."""
        theta = sum(float(p.double().square().sum()) for p in self._values.values()) ** 0.5
        size = sum(p.numel() for p in self._values.values()) ** 0.5
        return float((3 * eps) ** (1 / 3) * (1.0 + theta / size))

    def _quotient(self, v: Vectors, step: float) -> Vectors:
        forward, backward = self._gradient(self._moved(v, step)), self._gradient(self._moved(v, -step))
        return vectors.scale(vectors.add(forward, backward, -1.0), 0.5 / step)

    def _moved(self, v: Vectors, step: float) -> dict[str, Tensor]:
        moves = {c.name: step * c.scatter(v[c.name][0]) for c in self._space.coordinates}
        return {name: value + moves[name].to(value) for name, value in self._values.items()}

    def _gradient(self, values: dict[str, Tensor]) -> Vectors:
        _, parts = gradient_parts(self._problem, self._b, values, self._loss)
        self._used = (self._used or set()) | {name for name, part in parts.items() if part is not None}
        result = self._space.zeros()
        for c in self._space.coordinates:
            part = parts[c.name]
            if part is not None:
                result[c.name][0] = c.gather(part)
        return result
