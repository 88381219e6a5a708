"""Streamed: exact products of which one block's graph lives at a time.

Up through the trunk on dual numbers (h, h') without a graph, storing these at the borders between blocks; then from the top
down, one block after the other, its own graph and the reverse passes through it (`stages`). Memory is near that of one training
step, whatever the number of blocks: borders, one block's graph, and the vectors themselves.

A product costs 3 forward passes for h', 3 for the graphs, which a call's vectors share, and 6 through them. The first one records
how the model calls its blocks on its way up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesscope.engines.base import Linearization, ValuesOnDemand, require_recording
from hesscope.engines.output_tails import JOINED, ByToken, Middle, Tail, split_outputs
from hesscope.engines.stages import Above, Graph, Piece, Values, carried, tangent
from hesscope.engines.trunk_plan import TrunkPlan
from hesscope.engines.trunk_run import Block, Call, NotATrunk, Pieces, Through, record
from hesscope.errors import HesscopeError
from hesscope.losses import CausalLMLoss, PositionsLoss, head_note, output_weight, position_chunks
from hesscope.memory import storage_key
from hesscope.problem import Problem
from hesscope.resting import Borders, Rest, Resting
from hesscope.space import Space, Vectors, vectors

_Piece = tuple[Piece, Values, Tensor | None]


class StreamedBatch(Linearization):
    """One batch's hidden states at the borders of the blocks that a derivative reaches."""

    def __init__(self, problem: Problem, b: int, space: Space, plan: TrunkPlan) -> None:
        self._problem, self._b, self._space, self._plan = problem, b, space, plan
        require_recording()
        self._values = ValuesOnDemand(problem, space)
        self.head = head_note(plan.head)
        self._rest = Rest(problem.borders)
        self._pieces = Pieces(problem, b, plan.trunk)
        self._recorded: tuple[Borders, float] | None = None
        self._used: set[str] = set()

    @property
    def unused(self) -> list[str]:  # type: ignore[override]
        """Known after the first product or gradient."""
        return [name for name in self._space.names if name not in self._used]

    @property
    def total(self) -> float:  # type: ignore[override]
        return self._record()[1]

    @property
    def settled(self) -> bool:  # type: ignore[override]
        return self._recorded is not None

    @property
    def bytes(self) -> int:  # type: ignore[override]
        return _bytes([*self._h.kept, *self._pieces.calls])

    @property
    def gradient_units(self) -> float:  # type: ignore[override]
        return 3.0 + (not self.settled)

    @property
    def _h(self) -> Borders:
        """The hidden states at the borders."""
        return self._record()[0]

    def gradient(self) -> Vectors:
        result = self._space.zeros()
        parts, total = [], 0.0
        for piece in self._heads():
            graph = Graph(*piece, self._below_head)
            total += float(graph.y.detach())
            parts.append(graph.transposed(None, last=True))
        self._require_total(total)
        for found, _ in parts:
            self._add(found, self._outside_names, 0, result)
        self._descend_first_order([self._joined([below for _, below in parts])], result)
        return result

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        self.passes += 1
        self._add_product(V, self._up(V), into)

    @abstractmethod
    def _add_product(self, V: Vectors, tangents: list[list[Resting | None]], into: Vectors) -> None:
        """Add the product, from h' at every border for every vector."""

    # ---- the pieces

    @property
    def _outside_names(self) -> dict[str, str]:
        return {name: name for name in self._plan.outside}

    @property
    def _below_head(self) -> bool:
        """Whether a derivative goes on below the head."""
        return self._blocks > 0 or self._plan.stem

    @property
    def _blocks(self) -> int:
        """How many blocks a derivative reaches."""
        return len(self._plan.trunk.blocks) - self._plan.start

    def _picked(self, names: dict[str, str]) -> Values:
        found = self._values.several(list(names.values()))
        return {local: found[name] for local, name in names.items()}

    def _block(self, i: int) -> _Piece:
        """The i-th of the blocks that a derivative reaches, with its parameters and its input."""
        number = self._plan.start + i

        def run(values: Values, h: Tensor | None) -> Tensor:
            assert h is not None
            return self._pieces.block(number, values, h)

        return run, self._picked(self._block_names(i)), self._h[i]

    def _block_names(self, i: int) -> dict[str, str]:
        return self._plan.inside[self._plan.start + i]

    def _stem(self) -> _Piece:
        return lambda values, h: self._pieces.stem(values), self._picked(self._outside_names), None

    def _slices(self) -> list[slice]:
        """The positions that the head takes at a time."""
        if self._plan.head is not None:
            return [slice(None)]
        h, weight, loss = self._h.last, output_weight(self._problem.model), self._problem.loss
        # A loss that builds on the next-token loss, and hidden states that are not one a token, are taken whole.
        one_a_token = len(h.shape) == 3 and h.shape[:2] == self._problem.batches[self._b]["input_ids"].shape
        if type(loss) is not CausalLMLoss or weight is None or not one_a_token:
            return [slice(None)]
        return position_chunks(h.shape[0], h.shape[1], weight.shape[0] * max(h.dtype.itemsize, 4))

    def _require_total(self, found: float) -> None:
        """Raise NotATrunk where the head's parts do not add up to the loss."""
        eps = max(torch.finfo(c.dtype).eps for c in self._space.coordinates)
        if not abs(found - self.total) <= min(max(300 * eps, 1e-5), 0.02) * max(abs(self.total), 1e-30):
            raise NotATrunk(
                f"Expected the batch's loss, {self.total:.8g}, from the output of its last block, got {found:.8g}: the model mixes "
                "positions after its blocks, or carries something around them; use another engine."
            )

    def _heads(self) -> list[_Piece]:
        """The loss of a few positions at a time, with the head's parameters and its input."""
        loss, slices = self._problem.loss, self._slices()
        values, h_last = self._picked(self._outside_names), self._h[-1]

        def part(where: slice) -> _Piece:
            several = len(slices) > 1 and isinstance(loss, CausalLMLoss)
            some = PositionsLoss(loss, where) if several and isinstance(loss, CausalLMLoss) else self._plan.head

            def run(values: Values, h: Tensor | None) -> Tensor:
                assert h is not None
                return self._pieces.head(values, h, some)

            return run, values, h_last[:, where] if several else h_last

        return [part(where) for where in slices]

    @staticmethod
    def _joined(parts: list[Tensor | None]) -> Tensor | None:
        """What the chunks of the head send down, as one."""
        some = [part for part in parts if part is not None]
        if len(some) < len(parts):
            assert not some
            return None
        return some[0] if len(some) == 1 else torch.cat(some, 1)

    # ---- sweeps

    def _record(self, through: Through | None = None) -> tuple[Borders, float]:
        """Run the model once and keep what its blocks were called with; returns the borders, and the summed loss."""
        if self._recorded is None:
            plan = self._plan
            with torch.no_grad():
                total, calls = record(self._problem, self._b, plan.trunk, loss=plan.head, through=through)
            self._pieces.note(calls)
            h = Borders(self._rest, [*(call.hidden for call in calls[plan.start :]), calls[-1].output])
            self._recorded = h, float(total)
        return self._recorded

    def _up(self, V: Vectors) -> list[list[Resting | None]]:
        """h' at every border, for every vector, where borders rest."""
        if not self.settled and not self._plan.apart:
            try:
                return self._up_recording(V)
            except (HesscopeError, RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._record()  # where this does, it is the two together that the model does not run
                self._plan.apart = True
        found = [self._stem_tangents(V)]
        for i in range(self._blocks):
            found.append(self._through_block(i, V, found[-1]))
        return found

    def _through_block(self, i: int, V: Vectors, under: list[Resting | None]) -> list[Resting | None]:
        """h' above a block, whose parameters are there for as long as that takes."""
        piece, names = self._block(i), self._block_names(i)
        return [self._laid(tangent(*piece, self._part(V, k, names), dh)) for k, dh in enumerate(_brought(under))]

    def _up_recording(self, V: Vectors) -> list[list[Resting | None]]:
        """The same, in one with the recording."""
        found = [self._stem_tangents(V)]

        def through(number: int, block: Block) -> Any:
            if number < self._plan.start:
                return block.plain()
            names = self._plan.inside[number]
            values = block.values(names)
            values |= self._picked({local: name for local, name in names.items() if local not in values})
            v = [self._part(V, k, names) for k in range(vectors.count(V))]
            result, tangents = carried(block.result, values, block.hidden, v, _brought(found[-1]))
            found.append([self._laid(dh) for dh in tangents])
            return result

        self._record(through)
        return found

    def _stem_tangents(self, V: Vectors) -> list[Resting | None]:
        if not self._plan.stem:
            return [None] * vectors.count(V)
        piece, names = self._stem(), self._outside_names
        return [self._laid(tangent(*piece, self._part(V, k, names), None)) for k in range(vectors.count(V))]

    def _laid(self, dh: Tensor | None) -> Resting | None:
        return None if dh is None else self._rest.put(dh)

    def _descend_first_order(self, cotangents: list[Tensor | None], into: Vectors) -> None:
        """J^T u from below the head, for every u."""
        for i in reversed(range(self._blocks)):
            graph = Graph(*self._block(i), self._plan.stem or i > 0)
            cotangents = self._step(graph, self._block_names(i), cotangents, into)
        if self._plan.stem:
            self._step(Graph(*self._stem(), False), self._outside_names, cotangents, into)

    def _step(
        self, graph: Graph, names: dict[str, str], cotangents: list[Tensor | None], into: Vectors
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for k, u in enumerate(cotangents):
            parts, below = ({}, None) if u is None else graph.transposed(u, last=k == len(cotangents) - 1)
            self._add(parts, names, k, into)
            found.append(below)
        return found

    # ---- vectors

    def _part(self, V: Vectors, k: int, names: dict[str, str]) -> Values:
        """The part of the k-th vector that belongs to a piece, as whole parameters."""
        wanted = {name: local for local, name in names.items()}
        own = [c for c in self._space.coordinates if c.name in wanted]
        parts = vectors.parts_of(V, [c.name for c in own], k)
        return {wanted[c.name]: c.scatter(parts[c.name]).to(self._values.device(c.name), c.dtype) for c in own}

    def _add(self, parts: Values, names: dict[str, str], k: int, into: Vectors) -> None:
        by_name = {names[local]: part for local, part in parts.items()}
        self._used |= set(by_name)
        own = [c for c in self._space.coordinates if c.name in by_name]
        vectors.add_parts(into, k, {c.name: c.gather(by_name[c.name].detach()).to(c.device) for c in own})


def _brought(resting: list[Resting | None]) -> list[Tensor | None]:
    return [None if x is None else x.bring() for x in resting]


def _bytes(kept: list[Any]) -> int:
    """What tensors hold, each storage once."""
    leaves = [leaf for x in kept for leaf in tree_leaves((x.args, x.kwargs) if isinstance(x, Call) else x)]
    storages = {storage_key(x): x.untyped_storage().nbytes() for x in leaves if isinstance(x, Tensor)}
    return sum(storages.values())


class StreamedHessian(StreamedBatch):
    """The Hessian of one batch's summed loss."""

    def _add_product(self, V: Vectors, tangents: list[list[Resting | None]], into: Vectors) -> None:
        above = self._head(V, _brought(tangents[-1]), into)
        for i in reversed(range(self._blocks)):
            graph = Graph(*self._block(i), i > 0 or self._plan.stem, valueless=True)
            above = self._stage(graph, self._block_names(i), above, V, _brought(tangents.pop(-2)), into)
        if self._plan.stem:
            nothing: list[Tensor | None] = [None] * vectors.count(V)
            self._stage(Graph(*self._stem(), False, valueless=True), self._outside_names, above, V, nothing, into)

    def _head(self, V: Vectors, tangents: list[Tensor | None], into: Vectors) -> Above:
        found, total = [], 0.0
        slices = self._slices()
        for where, piece in zip(slices, self._heads(), strict=True):
            cut = [None if dh is None else dh[:, where] if len(slices) > 1 else dh for dh in tangents]
            graph = Graph(*piece, self._below_head, valueless=True)
            total += float(graph.y.detach())
            found.append(self._stage(graph, self._outside_names, None, V, cut, into))
        self._require_total(total)
        cotangent = self._joined([above.cotangent for above in found])
        return Above(cotangent, [self._joined([a.tangents[k] for a in found]) for k in range(vectors.count(V))])

    def _stage(
        self,
        graph: Graph,
        names: dict[str, str],
        above: Above | None,
        V: Vectors,
        tangents: list[Tensor | None],
        into: Vectors,
    ) -> Above:
        """One stage's parts of the product, added; returns what the stage below needs."""
        count = vectors.count(V)
        v = [self._part(V, k, names) for k in range(count)]
        parts, under, used = graph.second_order(above, v, tangents)
        for k in range(count):
            self._add(parts[k], names, k, into)
        self._used |= {names[local] for local in used}
        return under or Above(None, [None] * count)


class StreamedOutputs(StreamedBatch):
    """J^T M J of one batch's outputs, for any matrix M on them."""

    def __init__(self, problem: Problem, b: int, space: Space, plan: TrunkPlan, middle: Middle) -> None:
        super().__init__(problem, b, space, plan)
        self._middle = middle
        if isinstance(middle, ByToken) and not middle.apart:
            self.head = JOINED

    def _add_product(self, V: Vectors, tangents: list[list[Resting | None]], into: Vectors) -> None:
        made: list[Callable[[Tensor], Tail]] = []

        def last(values: Values, h: Tensor | None) -> Tensor:
            assert h is not None
            z, tail_of = self._split(values, h)
            made.append(tail_of)
            return z

        piece, names = (last, self._picked(self._outside_names), self._h[-1]), self._outside_names
        along = [self._part(V, k, names) for k in range(vectors.count(V))]
        dz = [tangent(*piece, v, dh) for v, dh in zip(along, _brought(tangents[-1]), strict=True)]
        graph = Graph(*piece, self._below_head)
        middle: list[Tensor | None] = [None] * len(dz)
        with torch.no_grad():
            tail = made[-1](graph.y.detach())
            made.clear()
            for k, u in enumerate(dz):
                if u is not None:
                    below, parts = tail.product(u, {name: along[k][name] for name in tail.names})
                    self._add(parts, names, k, into)
                    middle[k] = below.to(graph.y.dtype)
        self._descend_first_order(self._step(graph, names, middle, into), into)

    def _split(self, values: Values, h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tail]]:
        """The tensor before the tail, from the output of the last block."""
        problem, b = self._problem, self._b
        with self._pieces.passing_on(h):
            return split_outputs(
                problem, b, self._middle, values,
                lambda: problem.outputs(b, values), lambda function: problem.run(function, b, values), keep=False,
            )  # fmt: skip
