"""engine="auto": reverse-over-reverse, until measurement shows something faster.

On a kept graph reverse-over-reverse needs the fewest passes, so a run begins with it. After some products the other exact
arrangements are timed against it on a small part of the first batch, with as many vectors at once as the run uses. What gives
the same product in clearly less time there is timed on the whole first batch, and takes over where it is faster there, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch

from hesscope.engines.base import Differential, Engine, Linearization
from hesscope.engines.checking import disagreement, leading_part, tolerated
from hesscope.engines.dry import DryRuns
from hesscope.engines.forward_context import NotInForwardMode
from hesscope.engines.forward_mode import ForwardMode, ForwardOverReverse, ReverseOverForward
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.errors import HesscopeError
from hesscope.memory import available_together
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

#: The first look is at so small a part of all the data, or at the first batch where that is less.
PART = 16
#: It costs about as much as 10 products over what it looks at, and is made once the run has cost as much as so many: a
#: twentieth, after 13 products where the first batch can be cut and after fewer where it is a smaller part of the data.
PAYS = 200
#: Another engine takes over where it needs at most this share of the time: less would be noise, and change from run to run.
CLEARLY_FASTER = 0.75
#: Below so many multiplications in a pass over the data (parameters x terms) there is nothing to win on a CPU.
WORTHWHILE = 10**9
_AT_ONCE = 4


class Auto(Engine):
    """Delegates to reverse-over-reverse, or to what a measurement has put in its place."""

    name = "auto"
    asked = False
    candidates: tuple[type[ForwardMode], ...] = (ForwardOverReverse, ReverseOverForward)

    def __init__(self) -> None:
        self._engine: Engine = ReverseOverReverse()
        self._measured = self._settled = False
        self._part: Problem | None = None
        self.note = f"{self._engine.name}: not measured, the run is short"
        self._copy_units()

    def for_part(self) -> Engine:
        other = copy(self)
        other._engine = self._engine.for_part()
        return other

    @property
    def chosen(self) -> str:
        """The name of the engine that runs."""
        return self._engine.name

    def choose(self, name: str, note: str) -> None:
        """Let the engine of that name run, for the reason in `note`."""
        if name != self.chosen:
            self._engine = next(kind() for kind in self.candidates if kind.name == name)
            self._copy_units()
        self.note = note

    @property
    def settled(self) -> bool:
        """Whether another engine runs for want of memory, and nothing is measured."""
        return self._settled

    def settle(self, engine: Engine, reason: str) -> None:
        """Let another engine run from now on."""
        self._engine, self._measured, self._settled = engine, True, True
        self.note = f"{engine.name}: {reason}"
        self._copy_units()

    def prepare(self, problem: Problem, space: Space) -> float:
        return self._engine.prepare(problem, space) if self._settled else 0.0

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        return self._engine.linearize(problem, b, space)

    def gradient_alone(self, problem: Problem, b: int, space: Space) -> Differential | None:
        return self._engine.gradient_alone(problem, b, space)

    def due(self, problem: Problem, products: int) -> bool:
        """Whether it is time to measure, after so many products."""
        first, spent = problem.counts[0], products * problem.N
        if self._measured or first == 0 or spent < PAYS * min(first, problem.N / PART):
            return False
        if problem.device.type == "cpu" and _multiplications(problem) < WORTHWHILE:
            self._measured = True
            self.note = f"{self._engine.name}: not measured, the model and its data are small"
            return False
        if self._part is None:
            self._part = leading_part(problem, problem.N / PART)
        self._measured = spent >= PAYS * self._part.counts[0]
        return self._measured

    def measure(self, problem: Problem, space: Space, V: Vectors, first: Linearization, kept: bool) -> float:
        """Time everyone on a part of the first batch, the fastest on the whole of it, and choose.

        `first` is reverse-over-reverse's linearization of the batch; where it is not kept, making it is part of a product.
        Returns the cost, in passes over the first batch.
        """
        V = vectors.columns(V, 0, min(_AT_ONCE, vectors.count(V)))
        part, terms = self._part, problem.counts[0]
        if part is None or part.counts[0] == terms:
            race = _race(problem, space, V, first, kept, self.candidates, whole=True)
            spent, where = race.units, "on the first batch"
        else:
            there = ReverseOverReverse().linearize(part, 0, space)
            race = _race(part, space, V, there, kept, self.candidates, whole=False)
            spent = (race.units + ReverseOverReverse.build_units) * part.counts[0] / terms
            where = f"on {part.counts[0]} of the first batch's {terms} terms"
            del there
            if race.faster:
                race = _race(problem, space, V, first, kept, race.faster, whole=True)
                spent, where = spent + race.units, "on the first batch"
        self._part = None
        self._engine = race.faster[0]() if race.faster else self._engine
        self._copy_units()
        at_once = f", {vectors.count(V)} vectors at once" if vectors.count(V) > 1 else ""
        self.note = f"{self._engine.name}: seconds a product {where}{at_once}: {'; '.join(race.found)}"
        return spent

    def _copy_units(self) -> None:
        self.build_units, self.pass_units = self._engine.build_units, self._engine.pass_units
        self.product_units = self._engine.product_units


@dataclass(frozen=True)
class _Race:
    """Who needs clearly less time than reverse-over-reverse, fastest first; what everyone needs, in words; the cost."""

    faster: list[type[ForwardMode]]
    found: list[str]
    units: float


def _race(
    problem: Problem,
    space: Space,
    V: Vectors,
    first: Linearization,
    kept: bool,
    candidates: Sequence[type[ForwardMode]],
    whole: bool,
) -> _Race:
    """Time products with V on the first batch, of which `first` is reverse-over-reverse's linearization.

    Whether another engine's would fit is asked of the `whole` batch alone.
    """
    K = vectors.count(V)
    reverse, expected = ReverseOverReverse(), space.zeros(K)
    own = _seconds(problem, lambda: first.add_product(V, expected))
    spent = reverse.units(0, 0, K)
    if not kept:
        own += _seconds(problem, lambda: reverse.linearize(problem, 0, space))
        spent += reverse.units(1, 0, 0)
    times: dict[type[ForwardMode], float] = {}
    found = [f"{reverse.name} {own / K:.2g}"]
    for kind in candidates:
        engine = kind()
        if too_large := _does_not_fit(kind, problem, space, K) if whole else "":
            found.append(f"{engine.name} {too_large}")
            continue
        times[kind], remark, units = _trial(engine, problem, space, V, expected)
        spent += units
        found.append(f"{engine.name} {remark}")
    faster = sorted((kind for kind, taken in times.items() if taken <= CLEARLY_FASTER * own), key=times.__getitem__)
    return _Race(faster, found, spent)


def _trial(engine: Engine, problem: Problem, space: Space, V: Vectors, expected: Vectors) -> tuple[float, str, float]:
    """Seconds for a product with V (infinite where it does not run or is wrong), a remark, and the cost."""
    found = space.zeros(vectors.count(V))
    passes = engine.linearize(problem, 0, space)
    try:
        passes.add_product(V, found)  # torch prepares a good deal when something first runs
        gap = disagreement(space, expected, found)
        taken = _seconds(problem, lambda: passes.add_product(V, found))
    except (NotInForwardMode, torch.OutOfMemoryError) as error:
        return math.inf, f"does not run ({str(error)[:160]})", engine.units(1, passes.passes, 0)
    agrees = gap <= tolerated(space)
    remark = f"{taken / vectors.count(V):.2g}, {'' if agrees else 'wrong, '}differs by {gap:.1e}"
    return taken if agrees else math.inf, remark, engine.units(1, passes.passes, 2 * vectors.count(V))


def _does_not_fit(kind: type[ForwardMode], problem: Problem, space: Space, count: int) -> str:
    """What an engine's product would take, where that is more than there is; nothing where it fits or is not known."""
    try:
        needed = DryRuns(problem, space).product(kind, count, checked=False).resident
    except HesscopeError:
        return ""
    available = available_together(problem.devices)
    return f"not tried (would take {needed / 1e9:.2f} GB of {available / 1e9:.2f})" if needed > available else ""


def _seconds(problem: Problem, work: Callable[[], object]) -> float:
    """How long something takes, to the end of what it has started on the device."""
    _wait(problem.device)
    began = time.perf_counter()
    work()
    _wait(problem.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _multiplications(problem: Problem) -> int:
    """About how many multiplications a forward pass over the data takes: parameters x terms of the loss."""
    return sum(p.numel() for p in problem.model.parameters()) * problem.N
