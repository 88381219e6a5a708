"""For a Hessian H: its Gauss-Newton matrix G as a control variate, diag(H) = diag(G) + diag(H - G).

With a sign vector z and L sets of labels drawn from the model, gradients g_s of the sequences s at each of them, a sample is

    (1/L) sum over the sets of (1/N) sum_s g_s^2  +  z * ((H - G) z).

Both terms are unbiased for theirs, whatever G is. The first one's relative error does not grow with the number of weights; the
second has in entry i the variance sum_{j != i} (H - G)_ij^2 where z * (H z) has sum_{j != i} H_ij^2. It pays where the model
behind the layer is nearly linear, so that H - G is small. A sample counts as 2 + L products: one with H, one with G, L draws.
"""

from __future__ import annotations

import math
from typing import Any

from hesscope.algorithms.diagonals.drawn import Drawn
from hesscope.algorithms.diagonals.estimate import Limits
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors

#: Products of a sample beside those of the labels; the fewest of a whole one.
PAIR, FEWEST = 2, 3
#: Sets of labels for a sign vector, at most: more would leave too few samples for a standard error.
_MOST_LABELS = 8


class ControlVariate(Drawn):
    """Samples with a sign vector and `labels` sets of labels of their own."""

    method = "control-variate"

    def __init__(self, H: Operator, limits: Limits, seed: int, labels: int = 1) -> None:
        super().__init__(H, limits, seed)
        if not H.has_gauss_newton:
            raise HesscopeError(
                "Expected the Hessian (hs.hessian) of a language model, a classifier or a regressor for "
                f"method='control-variate', which samples its Gauss-Newton matrix's diagonal, got {H!r}; use method='auto'."
            )
        self._labels = labels
        self.least = PAIR + labels

    def draw(self, number: int) -> Vectors:
        z = self._H.space.rademacher(self._seed, [f"{self.method}/{number}"])
        total = vectors.multiply(z, remainder(self._H, z, self._H.matmat(z)))
        for k in range(number * self._labels, (number + 1) * self._labels):
            vectors.add_(total, vectors.scale(self._H.draw_gauss_newton(self._seed, k), 1.0 / self._labels))
        return total

    def record(self) -> dict[str, Any]:
        return {"labels": self._labels}


def remainder(H: Operator, Z: Vectors, HZ: Vectors) -> Vectors:
    """(H - G) Z from H Z."""
    return vectors.add(HZ, H.gauss_newton_product(Z), -1.0)


def labels_for(draw: tuple[float, float], rest: tuple[float, float]) -> int:
    """How many sets of labels a sign vector should have, for (variance, forward passes) of a draw and of z * ((H - G) z).

    (V_draw / L + V_rest) (c_rest + L c_draw) is least at L = sqrt(V_draw c_rest / (V_rest c_draw)).
    """
    wanted, worth = draw[0] * rest[1], rest[0] * draw[1]
    return min(_MOST_LABELS, max(1, round(math.sqrt(wanted / worth)))) if worth > 0 else _MOST_LABELS


def cost(draw: tuple[float, float], rest: tuple[float, float], labels: int) -> float:
    """Variance of a sample times its forward passes."""
    return (draw[0] / labels + rest[0]) * (rest[1] + labels * draw[1])
