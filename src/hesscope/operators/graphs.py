"""Which batches' linearizations are kept between products."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from hesscope.engines import Engine, Linearization
from hesscope.errors import UnusedParameters
from hesscope.memory import available_bytes
from hesscope.models import state_key
from hesscope.problem import Problem
from hesscope.space import Space


@dataclass
class GraphMemory:
    """Bytes that kept graphs may take together, those of a Hessian and of its Gauss-Newton matrix for instance, and take now."""

    limit: int
    used: int = 0

    def take(self, wanted: int) -> bool:
        """Whether so many bytes more fit; then they are taken."""
        fits = self.used + wanted <= self.limit
        self.used += wanted if fits else 0
        return fits


def graph_memory_of(problem: Problem, limit: int | None) -> GraphMemory:
    """So many bytes; half of the free memory for None."""
    return GraphMemory(available_bytes(problem.device) // 2 if limit is None else limit)


class KeptLinearizations:
    """Builds linearizations and keeps those that `memory` has room for, for as long as the parameters stay the same.

    The Hessian at fixed parameters is one operator, so a graph that is kept saves a third of every further product.
    """

    def __init__(self, problem: Problem, space: Space, engine: Engine, memory: GraphMemory) -> None:
        self._problem, self._space, self._engine = problem, space, engine
        self._memory = memory
        self._kept: dict[int, Linearization] = {}
        self._bytes = 0
        self._key = state_key(problem.model)
        self._unused: dict[int, set[str]] = {}

    @property
    def bytes(self) -> int:
        """What is held now."""
        return self._bytes

    @property
    def batches(self) -> int:
        """How many batches' linearizations are held now."""
        return len(self._kept)

    @property
    def error(self) -> float:
        """The largest relative error that an engine has estimated for a product."""
        return max((made.error for made in self._kept.values()), default=0.0)

    def drop(self) -> None:
        """Let go of everything that is kept."""
        self._kept.clear()
        self._memory.used -= self._bytes
        self._bytes = 0

    def get(self, b: int) -> tuple[Linearization, bool, bool]:
        """Batch b's linearization, whether it had to be built, and whether it is kept."""
        key = state_key(self._problem.model)
        if key != self._key:
            self.drop()
            self._key = key
        if b in self._kept:
            return self._kept[b], False, True
        made = self._engine.linearize(self._problem, b, self._space)
        keep = self._memory.take(made.bytes)
        if keep:
            self._kept[b] = made
            self._bytes += made.bytes
        return made, True, keep

    def note_unused(self, b: int, made: Linearization) -> None:
        """Warn once, after all batches were seen, of parameters that no batch uses; to be told after a batch's derivative."""
        if b in self._unused:
            return
        self._unused[b] = set(made.unused)
        warn_of_unused(self._unused, len(self._problem.batches))


def warn_of_unused(unused: dict[int, set[str]], batches: int) -> None:
    """Once every batch was seen, warn of parameters that none of them uses."""
    never = sorted(set.intersection(*unused.values())) if len(unused) == batches else []
    if never:
        warnings.warn(UnusedParameters(never), stacklevel=3)
