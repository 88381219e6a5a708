"""A choice among the estimators, made from a short pilot.

The pilot spends a few probes and a few Krylov directions. The probes tell the variance of a sample, without and with those
directions: their ratio r is what deflation achieves at once. Where the operator offers draws of its diagonal, a probe for every
sequence or a Gauss-Newton matrix beside it, a few samples of each are compared with that, by variance times forward passes.
Probes of the pilot are not used again, so the choice cannot bias what follows; the directions depend on no probe and are kept.
Where memory holds few vectors, the pilot has no directions; where vectors are divided among processes, no draws are tried, for
those are made whole. Where a target error is asked for, the estimate is given up for the
exact diagonal once it is seen to need more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hesscope.algorithms.budget import FEWEST_PROBES
from hesscope.algorithms.diagonals.control_variate import PAIR, ControlVariate
from hesscope.algorithms.diagonals.deflated import BLOCK
from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.exact import products_needed
from hesscope.algorithms.diagonals.exhaustive import Exhaustive
from hesscope.algorithms.diagonals.hutchinson import Hutchinson
from hesscope.algorithms.diagonals.nystrom import SHARE, Nystrom
from hesscope.algorithms.diagonals.per_sequence import PerSequence
from hesscope.algorithms.diagonals.pilot import DIRECTIONS, PROBES, Measured, Pilot, choice, nystrom_leaves, spread
from hesscope.algorithms.diagonals.sampled import Sampled
from hesscope.algorithms.diagonals.scheduled import Scheduled
from hesscope.algorithms.diagonals.subspace import Subspace
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.operators.free import vectors_that_fit
from hesscope.space import Vectors, vectors

#: With fewer products a pilot would take too large a part of them, and with still fewer there is nothing to approximate with;
#: with fewer than the last no control variate is tried, which takes a dozen.
FEWEST, FEWEST_KEPT, FEWEST_CONTROLLED = 60, 16, 100

_OTHERS: dict[str, Callable[[Operator, Limits, int], Estimator]] = {
    "hutchinson": Hutchinson,
    "sampled": Sampled,
    "per-sequence": PerSequence,
    "exact": Exhaustive,
}


class Automatic(Estimator):
    """The pilot, then the estimator that it chose."""

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        self._space = Subspace(H)
        self._chosen: Estimator | None = None
        self._why: dict[str, Any] = {}
        whole = H.space.divided is None
        self._draws_diagonal = whole and H.draws_diagonal
        self._draws_gauss_newton = whole and H.has_gauss_newton
        fits = vectors_that_fit(H.comm, H.space, H.dtype.itemsize)
        self._lean = fits < 4 * (limits.products if limits.fixed else FEWEST)
        if self._lean and (limits.products < FEWEST or not (self._draws_per_sequence or self._draws_gauss_newton)):
            self._follow("hutchinson", "the free memory")
        elif limits.products < FEWEST:
            few = "nystrom" if limits.products >= FEWEST_KEPT else "hutchinson"
            self._follow("sampled" if self._draws_diagonal else few, "the small budget")

    @property
    def _draws_per_sequence(self) -> bool:
        return self._H.space.divided is None and self._H.probed_groups > 1

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
            before = self._H.products
            chosen = self._pilot()
            self.spent += self._H.products - before
            self._follow(**chosen)
            return
        before = self._chosen.spent
        self._chosen.step()
        self.spent += self._chosen.spent - before
        self.expected = self._why["pilot_products"] + self._chosen.expected
        if self._give_up():
            tried = {
                "method": "exact",
                "reason": f"a pilot and {self._chosen.probes} samples",
                "pilot_products": self.spent,
            }
            self._follow(**self._why | tried)

    def estimate(self) -> Estimate:
        assert self._chosen is not None
        found = self._chosen.estimate()
        return Estimate(found.method, found.values, found.standard_error, found.degrees_of_freedom,
                        found.record | {"chosen": self._why})  # fmt: skip

    def note(self) -> str:
        return self._chosen.note() if self._chosen else "pilot"

    def _pilot(self) -> dict[str, Any]:
        """Measure and choose; returns what `_follow` takes."""
        pilot = Pilot(self._H, self._seed)
        if self._lean:
            plain = pilot.hutchinson()
            return self._best(
                pilot, plain, {"method": "hutchinson", "reason": "the free memory and a pilot"}, plain.cost
            )
        Z = self._H.space.rademacher(self._seed, [f"pilot/{i}" for i in range(PROBES)])
        AZ = self._H.matmat(Z)
        require_finite(self._H, AZ)
        units, products = self._H.units, self._H.products  # the graphs are built
        while self._space.q < DIRECTIONS and self._space.extend_krylov(BLOCK, self._seed, "krylov"):
            pass
        passes = (self._H.units - units) / max(self._H.products - products, 1)
        samples = vectors.multiply(Z, AZ)
        space = self._H.space
        plain = Measured(spread(space, samples), passes)
        deflated = spread(space, vectors.multiply(Z, self._space.residual(Z, AZ)))
        ratio = deflated / plain.variance if plain.variance > 0 else 1.0
        share = choice(ratio, self._limits.products)
        why = {"reason": "a pilot", "ratio": ratio, "share": share}
        if self._draws_diagonal:
            draws = pilot.sampled()
            if draws.cost < deflated * passes:
                return why | {"method": "sampled", "share": None, "exact_costs": self._exact_costs(plain, draws)}
        leaves = 1.0 if share is None else self._nystrom_leaves(ratio, samples, plain.variance)
        why["method"] = "hutchinson" if share is None else "nystrom"
        return self._best(pilot, plain, why, plain.cost * leaves, (Z, AZ))

    def _best(
        self,
        pilot: Pilot,
        plain: Measured,
        why: dict[str, Any],
        least: float,
        known: tuple[Vectors, Vectors] | None = None,
    ) -> dict[str, Any]:
        """The estimator so far, whose variance times forward passes is `least`, or one whose is below that."""
        if self._draws_per_sequence:
            found = pilot.per_sequence()
            why["per_sequence_gain"] = plain.variance / found.variance if found.variance > 0 else math.inf
            if found.cost < least:
                least = found.cost
                why |= {"method": "per-sequence", "share": None, "exact_costs": self._exact_costs(plain, found)}
        if self._draws_gauss_newton and self._limits.products >= FEWEST_CONTROLLED:
            controlled = pilot.control_variate(least, plain, known)
            if controlled is not None:
                found, labels = controlled
                why |= {"method": "control-variate", "share": None, "labels": labels}
                why |= {"control_variate_gain": plain.cost / found.cost if found.cost > 0 else math.inf}
                why |= {"exact_costs": self._exact_costs(plain, found, PAIR + labels)}
        return why

    def _exact_costs(self, plain: Measured, found: Measured, products: int = 1) -> float:
        """Forward passes of the exact diagonal, in those of a product of the estimator found."""
        return products_needed(self._H) * plain.passes * products / found.passes

    def _give_up(self) -> bool:
        """Whether the target is seen to cost more products than the exact diagonal, which the budget still allows."""
        assert self._chosen is not None
        target, n = self._limits.target, products_needed(self._H)
        if target is None or self._limits.seconds is not None or n > self._limits.products - self.spent:
            return False
        if self._chosen.probes < FEWEST_PROBES:
            return False
        excess = max(self._chosen.error / target, 1.0)
        if isinstance(self._chosen, Scheduled):  # which foresees its end by itself, once it has an error
            remaining = float(self._chosen.expected - self._chosen.spent) if math.isfinite(excess) else 0.0
        else:
            remaining = self._chosen.spent * (excess**2 - 1)
        return bool(remaining > self._why.get("exact_costs", n))

    def _nystrom_leaves(self, ratio: float, samples: Vectors, plain: float) -> float:
        """The part of Hutchinson's squared error that is expected with as many products as the target needs."""
        target, products = self._limits.target, self._limits.products
        if target is None:
            return nystrom_leaves(ratio, products)
        squares = float(self._H.space.total(lambda c: samples[c.name].mean(0).double().square().sum()))
        signal, needed = max(squares - plain / PROBES, 0.0), FEWEST
        while needed < products and plain * nystrom_leaves(ratio, needed) > needed * target**2 * signal:
            needed = min(math.ceil(1.1 * needed), products)
        return nystrom_leaves(ratio, needed)

    def own_state(self) -> dict[str, Any]:
        return {"why": self._why, "space": self._space.state(), "chosen": self._chosen and self._chosen.state()}

    def restore_own(self, state: dict[str, Any]) -> None:
        self._space.restore(state["space"])
        self._why = state["why"]
        if state["chosen"] is not None:
            self._begin()
            assert self._chosen is not None
            self._chosen.restore(state["chosen"])

    def _follow(self, method: str, reason: str, **measured: Any) -> None:
        """Begin with the estimator of that name; what was measured is kept with it."""
        none = {"pilot_products": self.spent, "ratio": None, "share": None}
        self._why = {"method": method, "reason": reason} | none | measured
        self._begin()

    def _begin(self) -> None:
        why = self._why
        limits, method = self._limits.after(why["pilot_products"]), why["method"]
        if method == "nystrom":
            kept = SHARE if why["share"] is None else why["share"]
            self._chosen = Nystrom(self._H, limits, self._seed, kept, self._space)
            return
        self._space = Subspace(self._H)
        if method == "control-variate":
            self._chosen = ControlVariate(self._H, limits, self._seed, why["labels"])
        else:
            self._chosen = _OTHERS[method](self._H, limits, self._seed)
