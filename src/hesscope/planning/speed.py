"""From the work of a dry run to seconds: every kind of operation timed by itself, corrected by one small batch really run.

A dry run knows which operations there are, on what shapes and how often. Each of these is run alone at its full size; what
surrounds them (autograd, Python, weights that no cache holds) is, for each engine, what a product on a short sequence takes
beyond its own operations, and a little for every operation that comes on top. Where an operation cannot be run at its size,
or all of them would take long,

    seconds = factor * (flops / F + bytes / B + operations * o)

with F, B and o from three loops of milliseconds, and the factor of each engine from that short sequence.

What the operating system takes to hand out memory is no part of any of these times: an operation that is run by itself gets new
memory where the same one in a product gets a gap between tensors, and the other way round. It is left out of what is measured, by
counting page faults, and comes back by the bytes that come anew in the whole run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from hesscope.dryrun import Kind, Meter, Work
from hesscope.engines import Engine
from hesscope.engines.checking import short_slice
from hesscope.engines.dry import DryProduct, DryRuns, NotDry, run_product
from hesscope.errors import HesscopeError
from hesscope.memory import available_bytes, available_together
from hesscope.problem import Problem
from hesscope.space import Space

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

#: Seconds that the small batch should take, about, and the fewest tokens that it has.
_TRIAL, _SHORTEST = 0.3, 16
#: The formula alone: an operation under autograd costs more than a bare one.
_PYTHON = 3.0
#: Bytes that the system hands out anew whenever they are asked for, rather than what has been freed.
_BLOCK = 2**27
#: Work that takes longer by the formula is not timed operation by operation.
_LONG = 100.0
#: An operation is repeated until it has taken this long, or so often.
_ENOUGH, _REPEATS = 0.05, 5


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second, seconds an operation; seconds for a byte that comes anew, and for a page fault."""

    flops: float
    bytes: float
    overhead: float
    first_touch: float = 0.0
    fault: float = 0.0

    def seconds(self, work: Work) -> float:
        """What the formula gives."""
        return work.flops / self.flops + work.bytes / self.bytes + work.operations * self.overhead


class Clock:
    """Seconds of work on a device, by its operations where these are known and can be run, else by the rates.

    Without `each` no operation is run.
    """

    def __init__(self, rates: Rates, device: torch.device, each: bool = True) -> None:
        self.rates, self.device, self._each = rates, device, each
        self._known: dict[Kind, float] = {}

    def seconds(self, work: Work) -> float:
        """What this work takes, in operations that nothing else surrounds."""
        found = self.by_operations(work)
        return self.rates.seconds(work) if found is None else found

    def by_operations(self, work: Work) -> float | None:
        """The sum of its operations' seconds; None where these are not known."""
        if not self._each or (work.operations > 0 and not work.kinds) or self.rates.seconds(work) > _LONG:
            return None
        try:
            return sum((count * self._of(kind) for kind, count in work.kinds.items()), 0.0)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return None  # an operation that does not take made-up numbers, or has no room

    def _of(self, kind: Kind) -> float:
        if kind not in self._known:
            self._known[kind] = self._timed(kind)
        return self._known[kind]

    def _timed(self, kind: Kind) -> float:
        if 3 * kind.nbytes > available_bytes(self.device):
            raise torch.OutOfMemoryError("an operation has no room")
        run = kind.run(self.device)
        run()  # prepares what is prepared once
        times: list[float] = []
        while not times or (sum(times) < _ENOUGH and len(times) < _REPEATS):
            # What is exponentiated in place over and over is soon infinite, and slow.
            run = kind.run(self.device) if kind.mutates else run
            times.append(_once(self.device, run, self.rates.fault))
        return median(times)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device for one dtype; takes a few hundredths of a second on a CPU."""
    square = torch.ones(768, 768, device=device, dtype=dtype)
    long = torch.ones(2**22, device=device, dtype=dtype)
    one = torch.ones(1, device=device, dtype=dtype)
    multiply = best_seconds(device, lambda: square @ square)
    stream = best_seconds(device, lambda: long * 2.0)
    tiny = best_seconds(device, lambda: [one * 2.0 for _ in range(100)]) / 100
    return Rates(2 * 768.0**3 / multiply, 2 * long.nbytes / stream, _PYTHON * tiny, *_first_touch(device))


def _first_touch(device: torch.device) -> tuple[float, float]:
    """What the operating system takes for a byte that it hands out, beyond writing it, and for a page fault; nothing on a GPU."""
    if device.type != "cpu":
        return 0.0, 0.0

    def filled_twice() -> tuple[float, float, int]:
        block = torch.empty(_BLOCK, dtype=torch.uint8)
        before = _page_faults()
        first = _once(device, lambda: block.fill_(1))
        return first, _once(device, lambda: block.fill_(2)), _page_faults() - before

    # The shortest of each: others on the machine make one longer, and a difference of neighbours anything.
    first, second, faults = (min(figures) for figures in zip(*(filled_twice() for _ in range(3)), strict=True))
    seconds = max(0.0, first - second)
    return seconds / _BLOCK, seconds / faults if faults else 0.0


def best_seconds(device: torch.device, work: Callable[[], object], repeats: int = 3, fault: float = 0.0) -> float:
    """The shortest of a few runs, so much for every page fault left out: others on the machine only ever make one longer."""
    return min(_once(device, work, fault) for _ in range(repeats))


@dataclass(frozen=True)
class Pace:
    """What a clock misses: a factor; or seconds beside operations, so many of which came with these."""

    factor: float = 1.0
    beside: float = 0.0
    operations: float = 0.0

    @property
    def timed(self) -> bool:
        """Whether the operations were timed one by one, in place of what rates say of them."""
        return self.operations > 0

    def seconds(self, clock: Clock, work: Work) -> float:
        """What the work takes; nothing takes none."""
        if work.operations == 0:
            return 0.0
        more = max(0.0, work.operations - self.operations) if self.timed else 0.0
        return self.factor * clock.seconds(work) + self.beside + more * clock.rates.overhead


@dataclass(frozen=True)
class Trial:
    """The paces of a linearization and of a product."""

    build: Pace = Pace()
    product: Pace = Pace()


def trial(
    problem: Problem, space: Space, make: Callable[[], Engine], full: DryProduct, clock: Clock, length: int
) -> Trial | None:
    """Run a product on a short sequence; None where that does not fit or does not run."""
    expected = clock.seconds(full.build + full.product)
    share = _TRIAL / max(expected, 1e-9)
    small = short_slice(problem, max(_SHORTEST, min(length, int(length * share))))
    try:
        dry = _work_of(small, space, make)
        if dry.resident > available_together(problem.devices):
            return None
        engine = make()
        V, into = space.zeros(), space.zeros()
        for part in V.values():
            part.fill_(1.0)
        made = engine.linearize(small, 0, space)
        made.add_product(V, into)  # torch prepares a good deal when something first runs
        fault = clock.rates.fault
        product = best_seconds(problem.device, lambda: made.add_product(V, into), 2, fault)
        build = best_seconds(problem.device, lambda: engine.linearize(small, 0, space), 2, fault)
    except (HesscopeError, torch.OutOfMemoryError):
        return None
    return Trial(_pace(clock, full.build, dry.build, build), _pace(clock, full.product, dry.product, product))


def _pace(clock: Clock, full: Work, small: Work, took: float) -> Pace:
    """From small work that took so long, for work like the full one."""
    alone = clock.by_operations(small)
    if clock.by_operations(full) is None or alone is None:
        return Pace(factor=took / max(clock.rates.seconds(small), 1e-9))
    return Pace(beside=max(0.0, took - alone), operations=small.operations)


def _work_of(small: Problem, space: Space, make: Callable[[], Engine]) -> DryProduct:
    """The work on a short sequence; counted while it is really done where that cannot be known otherwise."""
    try:
        return DryRuns(small, space).product(make, checked=False, replayed=False)
    except NotDry:
        with Meter() as meter:
            return run_product(make(), small, space, space.zeros(), meter, checked=False)


def _once(device: torch.device, work: Callable[[], object], fault: float = 0.0) -> float:
    """Seconds of one run, without so much for every page fault in it."""
    _wait(device)
    faults, began = _page_faults(), time.perf_counter()
    work()
    _wait(device)
    took = time.perf_counter() - began
    return max(0.0, took - fault * (_page_faults() - faults)) if fault else took


def _page_faults() -> int:
    """Of this process so far, those that need no disk; none where the system does not say."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt) if resource else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
