"""Streamed: exact products of which one block's graph lives at a time.

Up through the trunk on dual numbers (h, h') without a graph, storing these at the borders between blocks; then from the top
down, one block after the other, its own graph and the reverse passes through it (`stages`). Memory is near that of one training
step, whatever the number of blocks: borders, one block's graph, and the vectors themselves.

A product costs 3 forward passes for h', 3 for the graphs, which a call's vectors share, and 6 through them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesscope.engines.base import Linearization, parameter_values
from hesscope.engines.stages import Above, Graph, Piece, Values, tangent
from hesscope.engines.through_outputs import Middle
from hesscope.engines.trunk_plan import TrunkPlan
from hesscope.engines.trunk_run import Call, NotATrunk, Pieces, record
from hesscope.losses import CausalLMLoss, PositionsLoss, output_weight, position_chunks
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

_Piece = tuple[Piece, Values, Tensor | None]


class StreamedBatch(Linearization):
    """One batch's hidden states at the borders of the blocks that a derivative reaches."""

    gradient_units = 3.0

    def __init__(self, problem: Problem, b: int, space: Space, plan: TrunkPlan) -> None:
        self._problem, self._b, self._space, self._plan = problem, b, space, plan
        self._values = parameter_values(problem, space)
        with torch.no_grad():
            total, calls = record(problem, b, plan.trunk)
        self._h = [*(call.hidden for call in calls[plan.start :]), calls[-1].output]
        self._pieces = Pieces(problem, b, plan.trunk, calls)
        self.total = float(total)
        self.bytes = _bytes([*self._h, *self._pieces.calls])
        self._used: set[str] = set()

    @property
    def unused(self) -> list[str]:  # type: ignore[override]
        """Known after the first product or gradient."""
        return [name for name in self._space.names if name not in self._used]

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
    def _add_product(self, V: Vectors, tangents: list[list[Tensor | None]], into: Vectors) -> None:
        """Add the product, from h' at every border for every vector."""

    # ---- the pieces

    @property
    def _outside_names(self) -> dict[str, str]:
        return {name: name for name in self._plan.outside}

    @property
    def _below_head(self) -> bool:
        """Whether a derivative goes on below the head."""
        return len(self._h) > 1 or self._plan.stem

    def _picked(self, names: dict[str, str]) -> Values:
        return {local: self._values[name] for local, name in names.items()}

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
        h, weight, loss = self._h[-1], output_weight(self._problem.model), self._problem.loss
        # A loss that builds on the next-token loss, and hidden states that are not one a token, are taken whole.
        one_a_token = h.dim() == 3 and h.shape[:2] == self._problem.batches[self._b]["input_ids"].shape
        if type(loss) is not CausalLMLoss or weight is None or not one_a_token:
            return [slice(None)]
        return position_chunks(h.shape[0], h.shape[1], weight.shape[0] * max(h.itemsize, 4))

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

        def part(where: slice) -> _Piece:
            some = PositionsLoss(loss, where) if len(slices) > 1 and isinstance(loss, CausalLMLoss) else None

            def run(values: Values, h: Tensor | None) -> Tensor:
                assert h is not None
                return self._pieces.head(values, h, some)

            return run, self._picked(self._outside_names), self._h[-1][:, where] if some else self._h[-1]

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

    def _up(self, V: Vectors) -> list[list[Tensor | None]]:
        """h' at every border, for every vector."""
        found: list[list[Tensor | None]] = [[] for _ in self._h]
        for k in range(vectors.count(V)):
            dh = tangent(*self._stem(), self._part(V, k, self._outside_names), None) if self._plan.stem else None
            found[0].append(dh)
            for i in range(len(self._h) - 1):
                dh = tangent(*self._block(i), self._part(V, k, self._block_names(i)), dh)
                found[i + 1].append(dh)
        return found

    def _descend_first_order(self, cotangents: list[Tensor | None], into: Vectors) -> None:
        """J^T u from below the head, for every u."""
        stages = [(self._block(i), self._block_names(i)) for i in range(len(self._h) - 1)]
        below = self._plan.stem
        for i, (piece, names) in reversed(list(enumerate(stages))):
            cotangents = self._step(Graph(*piece, below or i > 0), names, cotangents, into)
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
        return {
            wanted[c.name]: c.scatter(V[c.name][k]).to(c.dtype) for c in self._space.coordinates if c.name in wanted
        }

    def _add(self, parts: Values, names: dict[str, str], k: int, into: Vectors) -> None:
        by_name = {names[local]: part for local, part in parts.items()}
        self._used |= set(by_name)
        for c in self._space.coordinates:
            if c.name in by_name:
                into[c.name][k] += c.gather(by_name[c.name].detach())


def _bytes(kept: list[Any]) -> int:
    """What tensors hold, each storage once."""
    leaves = [leaf for x in kept for leaf in tree_leaves((x.args, x.kwargs) if isinstance(x, Call) else x)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves if isinstance(x, Tensor)}
    return sum(storages.values())


class StreamedHessian(StreamedBatch):
    """The Hessian of one batch's summed loss."""

    def _add_product(self, V: Vectors, tangents: list[list[Tensor | None]], into: Vectors) -> None:
        above = self._head(V, tangents[-1], into)
        for i in reversed(range(len(self._h) - 1)):
            graph = Graph(*self._block(i), i > 0 or self._plan.stem)
            above = self._stage(graph, self._block_names(i), above, V, tangents.pop(-2), into)
        if self._plan.stem:
            nothing: list[Tensor | None] = [None] * vectors.count(V)
            self._stage(Graph(*self._stem(), False), self._outside_names, above, V, nothing, into)

    def _head(self, V: Vectors, tangents: list[Tensor | None], into: Vectors) -> Above:
        found, total = [], 0.0
        for where, piece in zip(self._slices(), self._heads(), strict=True):
            cut = [None if dh is None else dh[:, where] if piece[2] is not self._h[-1] else dh for dh in tangents]
            graph = Graph(*piece, self._below_head)
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

    def _add_product(self, V: Vectors, tangents: list[list[Tensor | None]], into: Vectors) -> None:
        def outputs(values: Values, h: Tensor | None) -> Tensor:
            assert h is not None
            return self._pieces.outputs(values, h)

        piece = (outputs, self._picked(self._outside_names), self._h[-1])
        along = [self._part(V, k, self._outside_names) for k in range(vectors.count(V))]
        dz = [tangent(*piece, v, dh) for v, dh in zip(along, tangents[-1], strict=True)]
        graph = Graph(*piece, self._below_head)
        with torch.no_grad():
            multiply = self._middle(self._problem, self._b, graph.y.detach())
            middle = [None if x is None else multiply(x).to(graph.y.dtype) for x in dz]
        self._descend_first_order(self._step(graph, self._outside_names, middle, into), into)
