"""The streamed engine, for the Hessian and for matrices through the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy

from torch import Tensor

from hesscope.engines.base import Engine, Linearization
from hesscope.engines.checking import MULTIPLES, close, largest_disagreement, rounding_by_parameter, short_slice
from hesscope.engines.output_tails import Middle
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.engines.streamed import StreamedBatch, StreamedHessian, StreamedOutputs
from hesscope.engines.through_outputs import ThroughOutputs
from hesscope.engines.trunk_plan import TrunkPlan
from hesscope.errors import HesscopeError
from hesscope.losses import ChunkedHead, TokenMatrix
from hesscope.models import elsewhere
from hesscope.problem import Problem
from hesscope.space import Space

#: Weights that are brought for good while the engine is held to its reference.
_LOOK_BYTES = 2**26


class Streamed(Engine):
    """For a model whose graph does not fit. Before its first product it is held to the graph's on a short sequence.

    Raises HesscopeError where the model's blocks are no chain, or the product is another.
    """

    name = "streamed"
    build_units = 0.0
    pass_units = 3.0
    product_units = 9.0

    def __init__(self) -> None:
        self._plan: TrunkPlan | None = None
        self._held = False

    def for_part(self) -> Engine:
        other = copy(self)
        other._plan = None  # another selection runs through other pieces
        return other

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        if self._plan is None:
            self._plan = TrunkPlan(short_slice(problem), space)
        return self._batch(problem, b, space, self._plan)

    def prepare(self, problem: Problem, space: Space) -> float:
        if self._held:
            return 0.0
        small, reference = short_slice(problem), self._reference()
        self._plan, whole, space = TrunkPlan(small, space), space, _small_part(problem, space)
        plan = self._plan if space is whole else TrunkPlan(small, space)
        v, ours, theirs = space.rademacher(0, ["engine/0"]), space.zeros(), space.zeros()
        self._look(small, space, plan).add_product(v, ours)
        reference.linearize(small, 0, space).add_product(v, theirs, last=True)
        gap, units, note = largest_disagreement(space, ours, theirs), self.units(1, 1, 1) + reference.units(1, 0, 1), ""
        if gap > close(space):  # the rounding of a few coordinates in half precision may be as large
            rounding = rounding_by_parameter(space, reference.linearize(small, 0, space).add_product, v, theirs)
            if largest_disagreement(space, ours, theirs, rounding) > close(space):
                raise HesscopeError(
                    f"Expected the streamed product to equal {reference.name}'s, but on a short sequence it differs by {gap:.1e}: "
                    "the model carries values around its blocks; use another engine."
                )
            units, note = units + reference.units(1, 0, len(MULTIPLES)), ", which is rounding"
        why = "as asked" if self.asked else "for its memory"
        self.note = f"{self.name}, {why}: agrees with {reference.name} to {gap:.1e} on a short sequence{note}"
        self._held = True
        return small.counts[0] / problem.N * units

    def _reference(self) -> Engine:
        return ReverseOverReverse()

    def _look(self, small: Problem, space: Space, plan: TrunkPlan) -> StreamedBatch:
        """The batch that is held to the reference's."""
        return self._batch(small, 0, space, plan)

    def _batch(self, problem: Problem, b: int, space: Space, plan: TrunkPlan) -> StreamedBatch:
        return StreamedHessian(problem, b, space, plan)


def _small_part(problem: Problem, space: Space) -> Space:
    """The selection, or of offloaded weights only the smallest, for the reference has all that it differentiates in memory."""
    store = elsewhere(problem.model)
    if store is None or not any(name in store for name in space.names):
        return space
    room, chosen = _LOOK_BYTES, set[str]()
    for c in sorted(space.coordinates, key=lambda c: math.prod(c.parameter_shape)):
        room -= math.prod(c.parameter_shape) * c.dtype.itemsize
        if chosen and room < 0:
            break
        chosen.add(c.name)
    return Space([c for c in space.coordinates if c.name in chosen])


class StreamedThroughOutputs(Streamed):
    """J^T M J: up once with tangents, and down once."""

    pass_units = 1.0
    product_units = 5.0

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.middle = middle

    def _reference(self) -> Engine:
        return ThroughOutputs(_identity)

    def _look(self, small: Problem, space: Space, plan: TrunkPlan) -> StreamedBatch:
        # Labels drawn for M belong to whole batches, and it is J that is in question.
        return StreamedOutputs(small, 0, space, plan, _identity)

    def _batch(self, problem: Problem, b: int, space: Space, plan: TrunkPlan) -> StreamedBatch:
        return StreamedOutputs(problem, b, space, plan, self.middle)


class _Identity:
    """u -> u."""

    apart = True

    def __call__(self, problem: Problem, b: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda u: u

    def by_token(self, problem: Problem, b: int, head: ChunkedHead) -> TokenMatrix:
        return lambda rows, z_TV, q_TV: q_TV


_identity = _Identity()
