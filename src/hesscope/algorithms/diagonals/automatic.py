"""A choice among the estimators, made from a short pilot.

The pilot spends a few probes and a few Krylov directions. The probes tell the variance of a sample, without and with those
directions: their ratio r is what deflation achieves at once. Where the operator draws its diagonal, a few draws are compared
with that, by variance times forward passes. Probes of the pilot are not used again, so the choice cannot
bias what follows; the directions depend on no probe and are kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hesscope.algorithms.diagonals.deflated import BLOCK
from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.hutchinson import Hutchinson
from hesscope.algorithms.diagonals.nystrom import SHARE, Nystrom
from hesscope.algorithms.diagonals.sampled import Sampled
from hesscope.algorithms.diagonals.scheduled import vectors_that_fit
from hesscope.algorithms.diagonals.subspace import Subspace
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors

#: The pilot: probes and directions.
PROBES, DIRECTIONS = 6, 2 * BLOCK
#: With fewer products a pilot would take too large a part of them, and with still fewer there is nothing to approximate with.
FEWEST, FEWEST_KEPT = 60, 16
#: Below this gain Hutchinson's estimator is preferred, whose samples are independent.
_WORTH = 0.97


class Automatic(Estimator):
    """The pilot, then the estimator that it chose."""

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        self._space = Subspace(H)
        self._chosen: Estimator | None = None
        self._why: dict[str, Any] = {}
        if vectors_that_fit(H) < 4 * (limits.products if limits.fixed else FEWEST):
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
        units = self._H.units
        Z = self._H.space.rademacher(self._seed, [f"pilot/{i}" for i in range(PROBES)])
        AZ = self._multiply(Z)
        each = (self._H.units - units) / PROBES
        while self._space.q < DIRECTIONS and (added := self._space.extend_krylov(BLOCK, self._seed, "krylov")):
            self.spent += added
        plain = spread(vectors.multiply(Z, AZ))
        deflated = spread(vectors.multiply(Z, self._space.residual(Z, AZ)))
        ratio = deflated / plain if plain > 0 else 1.0
        share = choice(ratio, self._limits.products)
        if self._H.draws_diagonal and self._draws_are_better(deflated * each):
            self._follow("sampled", "a pilot", ratio)
        else:
            self._follow("hutchinson" if share is None else "nystrom", "a pilot", ratio, share)

    def _draws_are_better(self, other: float) -> bool:
        """Whether a draw's variance times its forward passes is less than `other`."""
        units = self._H.units
        draws = [self._H.draw_diagonal(self._seed, -1 - i) for i in range(PROBES)]
        self.spent += PROBES
        each = (self._H.units - units) / PROBES
        return each * spread({name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}) < other

    def _follow(self, name: str, reason: str, ratio: float | None = None, share: float | None = None) -> None:
        limits = self._limits.after(self.spent)
        self._why = {"method": name, "reason": reason, "pilot_products": self.spent, "ratio": ratio, "share": share}
        if name == "nystrom":
            kept = SHARE if share is None else share
            self._chosen = Nystrom(self._H, limits, self._seed, kept, self._space)
        else:
            self._chosen = (Sampled if name == "sampled" else Hutchinson)(self._H, limits, self._seed)

    def own_state(self) -> dict[str, Any]:
        return {"why": self._why, "space": self._space.state(), "chosen": self._chosen and self._chosen.state()}

    def restore_own(self, state: dict[str, Any]) -> None:
        spent, why = self.spent, state["why"]
        self._space.restore(state["space"])
        if state["chosen"] is not None:
            self.spent = why["pilot_products"]
            self._follow(why["method"], why["reason"], why["ratio"], why["share"])
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


def spread(samples: Vectors) -> float:
    """The variance of the samples, summed over the entries."""
    squares = sum(float((x - x.mean(0)).double().square().sum()) for x in samples.values())
    return squares / (vectors.count(samples) - 1)
