"""A choice among the estimators, made from a short pilot.

The pilot spends a few probes and a few Krylov directions. The probes tell the variance of a sample, without and with those
directions: their ratio r is what deflation achieves at once. Probes of the pilot are not used again, so the choice cannot
bias what follows; the directions depend on no probe and are kept.
"""

from __future__ import annotations

import math
from typing import Any

from hesscope.algorithms.diagonals.deflated import BLOCK
from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.hutchinson import Hutchinson
from hesscope.algorithms.diagonals.nystrom import SHARE, Nystrom
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
            self._follow(None, "the free memory")
        elif limits.products < FEWEST:
            self._follow(SHARE if limits.products >= FEWEST_KEPT else None, "the small budget")

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
        self.expected = PROBES + DIRECTIONS + self._chosen.expected if self._why.get("ratio") else self._chosen.expected

    def estimate(self) -> Estimate:
        assert self._chosen is not None
        found = self._chosen.estimate()
        return Estimate(found.method, found.values, found.standard_error, found.degrees_of_freedom,
                        found.record | {"chosen": self._why})  # fmt: skip

    def note(self) -> str:
        return self._chosen.note() if self._chosen else "pilot"

    def _pilot(self) -> None:
        """Measure and choose."""
        Z = self._H.space.rademacher(self._seed, [f"pilot/{i}" for i in range(PROBES)])
        AZ = self._multiply(Z)
        while self._space.q < DIRECTIONS and (added := self._space.extend_krylov(BLOCK, self._seed, "krylov")):
            self.spent += added
        plain, deflated = spread(Z, AZ), spread(Z, self._space.residual(Z, AZ))
        ratio = deflated / plain if plain > 0 else 1.0
        self._follow(choice(ratio, self._limits.products), "a pilot", ratio)

    def _follow(self, share: float | None, reason: str, ratio: float | None = None) -> None:
        limits = self._limits.after(self.spent)
        self._why = {"reason": reason, "pilot_products": self.spent, "ratio": ratio, "share": share}
        if share is None:
            self._chosen = Hutchinson(self._H, limits, self._seed)
        else:
            self._chosen = Nystrom(self._H, limits, self._seed, share, self._space)

    def own_state(self) -> dict[str, Any]:
        return {"why": self._why, "space": self._space.state(), "chosen": self._chosen and self._chosen.state()}

    def restore_own(self, state: dict[str, Any]) -> None:
        spent, why = self.spent, state["why"]
        self._space.restore(state["space"])
        if state["chosen"] is not None:
            self.spent = why["pilot_products"]
            self._follow(why["share"], why["reason"], why["ratio"])
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


def spread(Z: Vectors, AZ: Vectors) -> float:
    """The variance of z * (A z), summed over the entries."""
    samples = vectors.multiply(Z, AZ)
    squares = sum(float((x - x.mean(0)).double().square().sum()) for x in samples.values())
    return squares / (vectors.count(Z) - 1)
