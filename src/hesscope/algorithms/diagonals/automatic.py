"""A choice among the estimators, made from a short pilot.

The pilot spends a few probes and a few Krylov directions. The probes tell the variance of a sample, without and with those
directions: their ratio r is what deflation achieves at once. Where the operator offers draws of its diagonal, a few of them are
compared with that, by variance times forward passes. Probes of the pilot are not used again, so the choice cannot
bias what follows; the directions depend on no probe and are kept. Where memory holds few vectors, the pilot has no directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hesscope.algorithms.diagonals.deflated import BLOCK
from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.hutchinson import Hutchinson, add_samples
from hesscope.algorithms.diagonals.nystrom import SHARE, Nystrom
from hesscope.algorithms.diagonals.per_sequence import PerSequence
from hesscope.algorithms.diagonals.sampled import Sampled
from hesscope.algorithms.diagonals.scheduled import vectors_that_fit
from hesscope.algorithms.diagonals.subspace import Subspace
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.results.statistics import RunningMean
from hesscope.space import Vectors, vectors

#: The pilot: probes and directions.
PROBES, DIRECTIONS = 6, 2 * BLOCK
#: With fewer products a pilot would take too large a part of them, and with still fewer there is nothing to approximate with.
FEWEST, FEWEST_KEPT = 60, 16
#: Below this gain Hutchinson's estimator is preferred, whose samples are independent.
_WORTH = 0.97
_PACE = 1.4

_OTHERS: dict[str, Callable[[Operator, Limits, int], Estimator]] = {
    "hutchinson": Hutchinson,
    "sampled": Sampled,
    "per-sequence": PerSequence,
}


class Automatic(Estimator):
    """The pilot, then the estimator that it chose."""

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        self._space = Subspace(H)
        self._chosen: Estimator | None = None
        self._why: dict[str, Any] = {}
        self._lean = vectors_that_fit(H) < 4 * (limits.products if limits.fixed else FEWEST)
        if self._lean and (limits.products < FEWEST or H.probed_groups < 2):
            self._follow("hutchinson", "the free memory")
        elif limits.products < FEWEST:
            few = "nystrom" if limits.products >= FEWEST_KEPT else "hutchinson"
            self._follow("sampled" if H.draws_diagonal else few, "the small budget")

    @property
    def probes(self) -> int:
        return self._chosen.probes if self._chosen else 0

    @property
    def error(self) -> float:
        return self._chosen.error if self._chosen else math.inf

    @property
    def done(self) -> bool:
        return self._chosen is not None and self._chosen.done

    def step(self) -> None:
        if self._chosen is None:
            self._pilot()
            return
        before = self._chosen.spent
        self._chosen.step()
        self.spent += self._chosen.spent - before
        self.expected = self._why["pilot_products"] + self._chosen.expected

    def estimate(self) -> Estimate:
        assert self._chosen is not None
        found = self._chosen.estimate()
        return Estimate(found.method, found.values, found.standard_error, found.degrees_of_freedom,
                        found.record | {"chosen": self._why})  # fmt: skip

    def note(self) -> str:
        return self._chosen.note() if self._chosen else "pilot"

    def _pilot(self) -> None:
        """Measure and choose."""
        if self._lean:
            plain, each = self._measured(self._product_with_a_probe)
            self._choose("hutchinson", plain, plain * each, "the free memory and a pilot")
            return
        units = self._H.units
        Z = self._H.space.rademacher(self._seed, [f"pilot/{i}" for i in range(PROBES)])
        AZ = self._multiply(Z)
        each = (self._H.units - units) / PROBES
        while self._space.q < DIRECTIONS and (added := self._space.extend_krylov(BLOCK, self._seed, "krylov")):
            self.spent += added
        samples = vectors.multiply(Z, AZ)
        plain, deflated = spread(samples), spread(vectors.multiply(Z, self._space.residual(Z, AZ)))
        ratio = deflated / plain if plain > 0 else 1.0
        share = choice(ratio, self._limits.products)
        if self._H.draws_diagonal:
            variance, passes = self._measured(lambda i: self._H.draw_diagonal(self._seed, -1 - i))
            if variance * passes < deflated * each:
                self._follow("sampled", "a pilot", ratio)
                return
        leaves = 1.0 if share is None else self._nystrom_leaves(ratio, samples, plain)
        name = "hutchinson" if share is None else "nystrom"
        self._choose(name, plain, plain * leaves * each, "a pilot", ratio, share)

    def _choose(
        self, other: str, plain: float, cost: float, reason: str, ratio: float | None = None, share: float | None = None
    ) -> None:
        """A probe a sequence where its variance times forward passes is below that of the other estimator."""
        gain = None
        if self._H.probed_groups > 1:
            variance, passes = self._measured(lambda i: self._H.probe_diagonal(self._seed, -1 - i))
            gain = plain / variance if variance > 0 else math.inf
            if variance * passes < cost:
                other, share = "per-sequence", None
        self._follow(other, reason, ratio, share, gain)

    def _nystrom_leaves(self, ratio: float, samples: Vectors, plain: float) -> float:
        """The part of Hutchinson's squared error that is expected with as many products as the target needs."""
        target, products = self._limits.target, self._limits.products
        if target is None:
            return nystrom_leaves(ratio, products)
        squares = sum(float(x.mean(0).double().square().sum()) for x in samples.values())
        signal, needed = max(squares - plain / PROBES, 0.0), FEWEST
        while needed < products and plain * nystrom_leaves(ratio, needed) > needed * target**2 * signal:
            needed = min(math.ceil(1.1 * needed), products)
        return nystrom_leaves(ratio, needed)

    def _product_with_a_probe(self, i: int) -> Vectors:
        z = self._H.space.rademacher(self._seed, [f"pilot/{i}"])
        self.spent -= 1  # counted with the other samples
        return vectors.multiply(z, self._multiply(z))

    def _measured(self, sample: Callable[[int], Vectors]) -> tuple[float, float]:
        """The variance of a sample, summed over the entries, and the forward passes that it takes."""
        units, mean = self._H.units, RunningMean()
        for i in range(PROBES):
            found = sample(i)
            require_finite(self._H, found)
            add_samples(mean, found)
        self.spent += PROBES
        variance = sum(float(x.double().sum()) for x in mean.squares.values()) / (PROBES - 1)
        return variance, (self._H.units - units) / PROBES

    def _follow(
        self,
        name: str,
        reason: str,
        ratio: float | None = None,
        share: float | None = None,
        gain: float | None = None,
    ) -> None:
        limits = self._limits.after(self.spent)
        self._why = {"method": name, "reason": reason, "pilot_products": self.spent, "ratio": ratio, "share": share}
        self._why |= {} if gain is None else {"per_sequence_gain": gain}
        if name == "nystrom":
            kept = SHARE if share is None else share
            self._chosen = Nystrom(self._H, limits, self._seed, kept, self._space)
        else:
            self._space = Subspace(self._H)
            self._chosen = _OTHERS[name](self._H, limits, self._seed)

    def own_state(self) -> dict[str, Any]:
        return {"why": self._why, "space": self._space.state(), "chosen": self._chosen and self._chosen.state()}

    def restore_own(self, state: dict[str, Any]) -> None:
        spent, why = self.spent, state["why"]
        self._space.restore(state["space"])
        if state["chosen"] is not None:
            self.spent = why["pilot_products"]
            self._follow(why["method"], why["reason"], why["ratio"], why["share"], why.get("per_sequence_gain"))
            assert self._chosen is not None
            self._chosen.restore(state["chosen"])
        self.spent = spent


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


def spread(samples: Vectors) -> float:
    """The variance of the samples, summed over the entries."""
    squares = sum(float((x - x.mean(0)).double().square().sum()) for x in samples.values())
    return squares / (vectors.count(samples) - 1)
