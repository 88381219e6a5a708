"""From the work of a dry run to seconds: rates of this machine, corrected by one small batch that is really run.

    seconds = flops / F + bytes / B + operations * o

F, B and o come from three loops of milliseconds. What they miss (shapes, caches, kernels without a fast path) is one factor
for each engine: the time of its product on a short sequence over what the formula gives for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hesscope.dryrun import Meter, Work
from hesscope.engines import Engine
from hesscope.engines.checking import short_slice
from hesscope.engines.dry import DryProduct, DryRuns, NotDry, run_product
from hesscope.errors import HesscopeError
from hesscope.memory import available_bytes
from hesscope.problem import Problem
from hesscope.space import Space

#: Seconds that the small batch should take, about, and the fewest tokens that it has.
_TRIAL, _SHORTEST = 0.6, 16
#: The formula alone: an operation under autograd costs more than a bare one.
_PYTHON = 3.0


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second, and seconds an operation."""

    flops: float
    bytes: float
    overhead: float

    def seconds(self, work: Work) -> float:
        """What the formula gives."""
        return work.flops / self.flops + work.bytes / self.bytes + work.operations * self.overhead


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device for one dtype; takes a few hundredths of a second on a CPU."""
    square = torch.ones(768, 768, device=device, dtype=dtype)
    long = torch.ones(2**22, device=device, dtype=dtype)
    one = torch.ones(1, device=device, dtype=dtype)
    multiply = best_seconds(device, lambda: square @ square)
    stream = best_seconds(device, lambda: long * 2.0)
    tiny = best_seconds(device, lambda: [one * 2.0 for _ in range(100)]) / 100
    return Rates(2 * 768.0**3 / multiply, 2 * long.nbytes / stream, _PYTHON * tiny)


def best_seconds(device: torch.device, work: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of a few runs: others on the machine only ever make one longer."""
    return min(_once(device, work) for _ in range(repeats))


@dataclass(frozen=True)
class Trial:
    """How many times longer than by the formula a linearization and a product take."""

    build: float
    product: float


def trial(
    problem: Problem, space: Space, make: Callable[[], Engine], full: DryProduct, rates: Rates, length: int
) -> Trial | None:
    """Run a product on a short sequence; None where that does not fit or does not run."""
    expected = rates.seconds(full.build + full.product)
    share = _TRIAL / max(expected, 1e-9)
    small = short_slice(problem, max(_SHORTEST, min(length, int(length * share))))
    try:
        dry = _work_of(small, space, make)
        if dry.resident > available_bytes(problem.device):
            return None
        engine = make()
        V, into = space.zeros(), space.zeros()
        for part in V.values():
            part.fill_(1.0)
        made = engine.linearize(small, 0, space)
        made.add_product(V, into)  # torch prepares a good deal when something first runs
        product = best_seconds(problem.device, lambda: made.add_product(V, into), 2)
        build = best_seconds(problem.device, lambda: engine.linearize(small, 0, space), 1)
    except (HesscopeError, torch.OutOfMemoryError):
        return None
    return Trial(build / max(rates.seconds(dry.build), 1e-9), product / max(rates.seconds(dry.product), 1e-9))


def _work_of(small: Problem, space: Space, make: Callable[[], Engine]) -> DryProduct:
    """The work on a short sequence; counted while it is really done where that cannot be known otherwise."""
    try:
        return DryRuns(small, space).product(make, checked=False, replayed=False)
    except NotDry:
        with Meter() as meter:
            return run_product(make(), small, space, space.zeros(), meter, checked=False)


def _once(device: torch.device, work: Callable[[], object]) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
