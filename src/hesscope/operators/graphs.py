"""Which batches' linearizations are kept between products."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypeVar

from hesscope.engines import Differential, Engine, Linearization
from hesscope.errors import UnusedParameters
from hesscope.models import sharded, state_key
from hesscope.operators.free import free_on
from hesscope.problem import Problem
from hesscope.space import Space

T = TypeVar("T")


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
    """So many bytes; for None half of what every rank may take. Nothing stays of weights that are divided among processes.

    Called by all ranks.
    """
    if sharded(problem.model) is not None:
        return GraphMemory(0)
    return GraphMemory(half_of_free(problem) if limit is None else limit)


def half_of_free(problem: Problem) -> int:
    """Half of the bytes that every rank may take on whichever of its devices has least. Called by all ranks."""
    return free_on(problem.comm, problem.devices)[1] // 2


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
        self._undecided: set[int] = set()
        self._unused: dict[int, set[str]] = {}
        self._heads: dict[str, None] = {}
        self._warned = False

    @property
    def bytes(self) -> int:
        """What is held now."""
        return self._bytes

    @property
    def batches(self) -> int:
        """How many batches' linearizations are held now."""
        return len(self._kept)

    @property
    def head(self) -> str:
        """How the loss has taken the output projection, in words; of batches that differ, each way once."""
        return "; ".join(self._heads)

    def drop(self) -> None:
        """Let go of everything that is kept."""
        self._kept.clear()
        self._undecided.clear()
        self._memory.used -= self._bytes
        self._bytes = 0

    def get(self, b: int) -> tuple[Linearization, bool, bool]:
        """Batch b's linearization, whether it had to be built, and whether it is kept.

        One that does not know its bytes yet may be kept by `done_with`.
        """
        key = state_key(self._problem.model)
        if key != self._key:
            self.drop()
            self._key = key
        if b in self._kept:
            return self._kept[b], False, True
        made = self._engine.linearize(self._problem, b, self._space)
        if made.head:
            self._heads[made.head] = None
        if not made.settled:
            self._undecided.add(b)
        return made, True, made.settled and self._keep(b, made)

    def _keep(self, b: int, made: Linearization) -> bool:
        """Keep it if there is room."""
        keep = self._memory.take(made.bytes)
        if keep:
            self._kept[b] = made
            self._bytes += made.bytes
        return keep

    def for_gradient(self, b: int) -> tuple[Differential, bool]:
        """Batch b for its gradient, and whether a linearization had to be built."""
        kept = b in self._kept and state_key(self._problem.model) == self._key
        alone = None if kept else self._engine.gradient_alone(self._problem, b, self._space)
        return self.get(b)[:2] if alone is None else (alone, False)

    def done_with(self, b: int, made: Differential) -> None:
        """To be told of every batch, after its derivative."""
        if b not in self._unused:
            self._unused[b] = set(made.unused)
        if b in self._undecided and isinstance(made, Linearization):
            self._undecided.discard(b)
            self._keep(b, made)

    def every_batch_seen(self) -> None:
        """Warn once, when the ranks have been through all batches, of parameters that no batch uses."""
        if not self._warned:
            self._warned = True
            warn_of_unused(merged(self._problem.comm.gathered(self._unused)), len(self._problem.batches))


def merged(found: list[dict[int, T]]) -> dict[int, T]:
    """What the ranks found of their batches, as one."""
    return {b: value for of_rank in found for b, value in of_rank.items()}


def warn_of_unused(unused: dict[int, set[str]], batches: int) -> None:
    """Once every batch was seen, warn of parameters that none of them uses."""
    never = sorted(set.intersection(*unused.values())) if len(unused) == batches else []
    if never:
        warnings.warn(UnusedParameters(never), stacklevel=3)
