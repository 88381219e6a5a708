"""Draws of a Hessian's diagonal with a probe of its own for every sequence.

A = (1/N) sum over sequences s of H_s, so that  (1/N) sum_s v_s * (H_s v_s)  is unbiased for diag(A) and has in entry i the variance
(1/N^2) sum_s sum_{j != i} (H_s)_ij^2 where one probe for all has sum_{j != i} A_ij^2: up to S times less the more the sequences
agree. Probes are functions of seed, draw, the sequence's number in the data, parameter and index: neither batches nor the
selection change them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from hesscope.engines.linear_uses import Box
from hesscope.engines.sequence_probes import RankOne, SequenceProbes
from hesscope.models import state_key
from hesscope.operators.batch_plan import sequences_and_length, taken_apart
from hesscope.operators.graphs import half_of_free, merged, warn_of_unused
from hesscope.problem import Problem
from hesscope.space import Space, Vectors
from hesscope.space.random import signs, stream_key

#: Forward passes of a batch: its gradient's graph, and a probe through it.
BUILD_UNITS, PROBE_UNITS = 3.0, 6.0
#: Roundings by which sequences that are apart may seem to touch one another.
_ROUNDINGS = 100


class ProbedDiagonal:
    """Draws of the diagonal; batches' graphs are kept as far as `limit` bytes hold them, by default half of what every rank may take."""

    def __init__(
        self, problem: Problem, space: Space, limit: int | None, make_room: Callable[[], None] = lambda: None
    ) -> None:
        self._problem, self._space, self._make_room = problem, space, make_room
        self._limit = half_of_free(problem) if limit is None else limit
        self.units, self._looked = 0.0, 1.0  # the look at the layers is paid for by the first draw
        self._plans = taken_apart(problem, space, lambda name, box: _is_full(space, box, name))
        self._checked = all(sequences == 1 for _, sequences in self._plans)
        self._first = list(accumulate((_sequences(problem, b) for b in range(len(problem.batches))), initial=0))
        self._graphs: dict[int, SequenceProbes] = {}
        self._state: object = None
        self._unused: dict[int, set[str]] = {}
        self._warned = False

    @property
    def groups(self) -> int:
        """How many sequences have a probe of their own; 0 where no weight can be taken apart."""
        return sum(sequences for fits, sequences in self._plans if fits)

    @property
    def shared(self) -> list[str]:
        """Parameters with one probe for all sequences, in some batch at least."""
        return [c.name for c in self._space.coordinates if any(c.name not in fits for fits, _ in self._plans)]

    def drop(self) -> None:
        """Let go of the kept graphs."""
        self._graphs.clear()

    def draw(self, seed: int, number: int) -> Vectors:
        """Draw number `number` of a seed, as one vector."""
        self.units, self._looked = self.units + self._looked, 0.0
        ready = self._hold_apart(seed)
        total, stream, names = self._space.zeros(), f"per-sequence/{number}", set(self.shared)
        shared = Space([c for c in self._space.coordinates if c.name in names]).rademacher(seed, [stream])
        with self._problem.comm.summed(total) as own:
            before = self.units
            for b in self._problem.mine:
                graph = ready.pop(b) if b in ready else self._graph(b)
                fits, sequences = self._plans[b]
                graph.add(
                    self._probes(fits, seed, stream, self._numbers(b, sequences)), shared, total, 1.0 / self._problem.N
                )
                self.units += self._cost(b, PROBE_UNITS)
                del graph  # one that is not kept goes before the next is built
            own.amount = self.units - before
        self.units = before + own.amount
        if not self._warned:
            self._warned = True
            warn_of_unused(merged(self._problem.comm.gathered(self._unused)), len(self._plans))
        return total

    def _hold_apart(self, seed: int) -> dict[int, SequenceProbes]:
        """Once, before the first draw, look whether the sequences of a batch touch one another; then each batch is one.

        Returns the graph that was made for it, where it can be used.
        """
        if self._checked:
            return {}
        self._checked, ready = True, dict[int, SequenceProbes]()
        b = next(b for b, (_, sequences) in enumerate(self._plans) if sequences > 1)
        leak = torch.zeros(1, dtype=torch.float64)
        with self._problem.comm.summed({"leak": leak}) as own:
            if b in self._problem.mine:
                before = self.units
                fits, sequences = self._plans[b]
                ready[b] = self._graph(b)
                leak += ready[b].leak(self._probes(fits, seed, "leak", self._numbers(b, sequences)))
                self.units, own.amount = before, self.units - before + self._cost(b, PROBE_UNITS)
        self.units += own.amount
        if float(leak) > min(_ROUNDINGS * self._space.rounding, 1e-3):
            self._plans = [(fits, 1) for fits, _ in self._plans]
            self.drop()
            ready.clear()
        return ready

    def _numbers(self, b: int, sequences: int) -> range:
        """The numbers of a batch's sequences in the data."""
        return range(self._first[b], self._first[b] + sequences)

    def _cost(self, b: int, units: float) -> float:
        """Forward passes of a batch in those of all the data."""
        return units * self._problem.counts[b] / self._problem.N

    def _probes(self, boxes: dict[str, Box], seed: int, stream: str, sequences: range) -> dict[str, RankOne]:
        """The probes of some sequences; one stream a draw, parameter and axis, with a row for each sequence."""
        found = {}
        for name, box in boxes.items():
            rows = torch.tensor(sequences, device=box.device)[:, None]
            units = signs(stream_key(seed, stream, name, "units"), rows * box.out_features + box.units)
            inputs = signs(stream_key(seed, stream, name, "inputs"), rows * box.in_features + box.inputs)
            found[name] = RankOne(units.to(self._space.dtype), inputs.to(self._space.dtype))
        return found

    def _graph(self, b: int) -> SequenceProbes:
        """Batch b's graph, kept or new."""
        state = state_key(self._problem.model)
        if state != self._state:
            self.drop()
            self._state = state
        if b in self._graphs:
            return self._graphs[b]
        if not self._graphs:
            self._make_room()
        made = self._built(b)
        if made.bytes + sum(graph.bytes for graph in self._graphs.values()) <= self._limit:
            self._graphs[b] = made
        return made

    def _built(self, b: int) -> SequenceProbes:
        made = SequenceProbes(self._problem, b, self._space, *self._plans[b])
        self.units += self._cost(b, BUILD_UNITS)
        self._unused.setdefault(b, set(made.unused))
        return made


def _is_full(space: Space, box: Box, name: str) -> bool:
    """Whether all of a box is selected: a sign a unit times a sign an input is a probe of whole rows and columns only."""
    size: int = {c.name: c.size for c in space.coordinates}[name]
    return size == box.shape[0] * box.shape[1]


def _sequences(problem: Problem, b: int) -> int:
    """How many of the numbers of sequences batch b takes up."""
    tokens = sequences_and_length(problem, b)
    return tokens[0] if tokens else 1
