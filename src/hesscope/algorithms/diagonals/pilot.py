"""What a pilot measures: the variance of a sample, by estimator, and the forward passes that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hesscope.algorithms.diagonals.control_variate import cost, labels_for, remainder
from hesscope.algorithms.diagonals.deflated import BLOCK
from hesscope.algorithms.diagonals.hutchinson import add_samples
from hesscope.algorithms.diagonals.nystrom import SHARE, deviations
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.results.statistics import RunningMean
from hesscope.space import Space, Vectors, vectors

#: Probes and directions.
PROBES, DIRECTIONS = 6, 2 * BLOCK
#: Below this gain Hutchinson's estimator is preferred, whose samples are independent.
_WORTH = 0.97
_PACE = 1.4


@dataclass(frozen=True)
class Measured:
    """The variance of a sample, summed over the entries, and its forward passes."""

    variance: float
    passes: float

    @property
    def cost(self) -> float:
        """What the squared error is multiplied by for a forward pass."""
        return self.variance * self.passes


class Pilot:
    """Takes `PROBES` samples of one kind at a time; their numbers are negative, so that no estimate has them."""

    def __init__(self, H: Operator, seed: int) -> None:
        self._H, self._seed = H, seed

    def probe(self, i: int) -> Vectors:
        """Sign vector i."""
        return self._H.space.rademacher(self._seed, [f"pilot/{i}"])

    def measure(self, sample: Callable[[int], Vectors]) -> Measured:
        """Of `sample(0)` to `sample(PROBES - 1)`."""
        mean, spent = RunningMean(), []
        for i in range(PROBES):
            found = sample(i)
            require_finite(self._H, found)
            add_samples(mean, found)
            spent.append(self._H.units)
        variance = float(self._H.space.total(lambda c: mean.squares[c.name].double().sum())) / (PROBES - 1)
        return Measured(variance, (spent[-1] - spent[0]) / (PROBES - 1))  # the first sample may have graphs to build

    def hutchinson(self) -> Measured:
        """z * (H z), a product after the other."""
        return self.measure(self._product_with)

    def sampled(self) -> Measured:
        """Draws of the operator's own."""
        return self.measure(lambda i: self._H.draw_diagonal(self._seed, -1 - i))

    def per_sequence(self) -> Measured:
        """A probe for every sequence."""
        return self.measure(lambda i: self._H.probe_diagonal(self._seed, -1 - i))

    def control_variate(
        self, at_most: float, plain: Measured, known: tuple[Vectors, Vectors] | None
    ) -> tuple[Measured, int] | None:
        """Its sample with as many sets of labels as are best, and their number; None where it costs more than `at_most`.

        What is `known` is sign vectors and their products; otherwise they are multiplied anew.
        """
        rest = self.measure(lambda i: self._remainder(i, known))
        if known is not None:
            rest = Measured(rest.variance, rest.passes + plain.passes)
        if rest.cost >= at_most:
            return None
        draw = self.measure(lambda i: self._H.draw_gauss_newton(self._seed, -1 - i))
        pair = (draw.variance, draw.passes), (rest.variance, rest.passes)
        labels = labels_for(*pair)
        passes = rest.passes + labels * draw.passes
        found = Measured(cost(*pair, labels) / passes, passes)
        return (found, labels) if found.cost < at_most else None

    def _product_with(self, i: int) -> Vectors:
        z = self.probe(i)
        return vectors.multiply(z, self._H.matmat(z))

    def _remainder(self, i: int, known: tuple[Vectors, Vectors] | None) -> Vectors:
        if known is None:
            z = self.probe(i)
            return vectors.multiply(z, remainder(self._H, z, self._H.matmat(z)))
        z, Hz = (vectors.columns(V, i, i + 1) for V in known)
        return vectors.multiply(z, remainder(self._H, z, Hz))


def choice(ratio: float, products: int) -> float | None:
    """The share of Krylov directions in what follows, or None for Hutchinson's estimator.

    Deflation by q directions is expected to leave r^sqrt(q / 8) of the variance, for each further direction removes less; it
    has to leave less than the share of products that remain for probes.
    """
    if ratio > _WORTH:
        return None
    expected = ratio ** math.sqrt(SHARE * products / DIRECTIONS)
    return SHARE if expected < 1.0 - SHARE else 0.0


def nystrom_leaves(ratio: float, products: int) -> float:
    """The part of Hutchinson's squared error that a Nystrom estimate with so many products is expected to have.

    r^(1.4 sqrt(p / 8)), a fit: on five whole layers of one trained model, with 100 and 300 products, what the estimates
    stated was within a factor of four of it, and 0.97 times it in the geometric mean.
    """
    return float(ratio ** (_PACE * math.sqrt(products / DIRECTIONS)))


def spread(space: Space, samples: Vectors) -> float:
    """The variance of the samples, summed over the entries."""
    return deviations(space, samples) / (vectors.count(samples) - 1)
