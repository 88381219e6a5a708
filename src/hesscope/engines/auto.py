"""engine="auto": reverse-over-reverse, until measurement shows something faster.

On a kept graph reverse-over-reverse needs the fewest passes, so a run begins with it. Once a run has proven long, the other
exact arrangements are timed against it on the first batch, with as many vectors at once as the run uses, and one that gives
the same product in clearly less time takes over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import copy

import torch

from hesscope.engines.base import Differential, Engine, Linearization
from hesscope.engines.checking import disagreement, tolerated
from hesscope.engines.dry import DryRuns
from hesscope.engines.forward_context import NotInForwardMode
from hesscope.engines.forward_mode import ForwardMode, ForwardOverReverse, ReverseOverForward
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.errors import HesscopeError
from hesscope.memory import available_together
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

#: A run of so many products is long enough for the measurement, which costs about as much as 10 on the first batch,
PROVEN = 48
#: and so is one of any number that have cost as much as this many on the first batch.
PROVEN_THERE = 500
#: Another engine takes over where it needs at most this share of the time: less would be noise, and change from run to run.
CLEARLY_FASTER = 0.75
#: Below so many multiplications in a pass over the first batch (parameters x terms) there is nothing to win on a CPU.
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
        first = problem.counts[0]
        costly = first > 0 and products * problem.N >= PROVEN_THERE * first
        if self._measured or not (costly or products >= PROVEN):
            return False
        self._measured = True
        if problem.device.type == "cpu" and _multiplications(problem) < WORTHWHILE:
            self.note = f"{self._engine.name}: not measured, the model and its first batch are small"
            return False
        return True

    def measure(self, problem: Problem, space: Space, V: Vectors, first: Linearization, kept: bool) -> float:
        """Time everyone on the first batch and choose; returns the cost, in passes over that batch.

        `first` is reverse-over-reverse's linearization of the batch; where it is not kept, making it is part of a product.
        """
        V = vectors.columns(V, 0, min(_AT_ONCE, vectors.count(V)))
        K = vectors.count(V)
        reverse, expected = ReverseOverReverse(), space.zeros(K)
        own = _seconds(problem, lambda: first.add_product(V, expected))
        spent = reverse.units(0, 0, K)
        if not kept:
            own += _seconds(problem, lambda: reverse.linearize(problem, 0, space))
            spent += reverse.units(1, 0, 0)
        best, shortest, found = self._engine, CLEARLY_FASTER * own, [f"{reverse.name} {own / K:.2g}"]
        for kind in self.candidates:
            engine = kind()
            if too_large := _does_not_fit(kind, problem, space, K):
                found.append(f"{engine.name} {too_large}")
                continue
            taken, remark, units = _trial(engine, problem, space, V, expected)
            spent += units
            found.append(f"{engine.name} {remark}")
            if taken <= shortest:
                best, shortest = engine, taken
        self._engine = best
        self._copy_units()
        at_once = f", {K} vectors at once" if K > 1 else ""
        self.note = f"{best.name}: seconds a product on the first batch{at_once}: {'; '.join(found)}"
        return spent

    def _copy_units(self) -> None:
        self.build_units, self.pass_units = self._engine.build_units, self._engine.pass_units
        self.product_units = self._engine.product_units


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
    """About how many multiplications a forward pass over the first batch takes: parameters x terms of the loss."""
    return sum(p.numel() for p in problem.model.parameters()) * problem.counts[0]
