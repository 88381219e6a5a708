"""Vectors whose parts are divided among processes as their parameters are.

Of a parameter with R rows each process has some, and of every vector the same rows: the inner product is a sum over processes,
and nothing else of the algebra notices. Parts of single coordinates are not divided; every process has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscope.exchange import ByRows, Exchange, Table, box_of, divided_along
from hesscope.space import vectors
from hesscope.space.coordinates import Coordinates, Rows
from hesscope.space.divided import Divided, Outline
from hesscope.space.vectors import OnDemand, Passed, Vectors

#: Bytes of a file that are taken at once, unless a row has more.
_TAKEN = 64 * 2**20


class Division:
    """Which rows of a space's vectors are here."""

    def __init__(self, exchange: Exchange, rows: dict[str, Rows], shapes: dict[str, tuple[int, ...]]) -> None:
        self.exchange, self.rows = exchange, rows
        self.lengths = {name: shapes[name][0] for name in rows}
        #: Of all parts, divided or not, by whether all of it is meant or what is here.
        self._shapes = {True: shapes, False: shapes | {n: (r.stop - r.start, *shapes[n][1:]) for n, r in rows.items()}}

    @classmethod
    def of(cls, coordinates: Sequence[Coordinates]) -> Division | None:
        rows = {c.name: c.rows for c in coordinates if c.rows is not None}
        if not rows:
            return None
        return cls(next(iter(rows.values())).exchange, rows, {c.name: c.whole.shape for c in coordinates})

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes that hold different rows."""
        return self.exchange.total(x)

    def gathered(self, V: Vectors) -> Vectors:
        """All rows, on every process."""
        found = {}
        for name, part in V.items():
            if name not in self.rows:
                found[name] = part
                continue
            if len(part) == 0:
                found[name] = part.new_empty(0, self.lengths[name], *part.shape[2:])
                continue
            first = part.transpose(0, 1).contiguous()  # rows first
            whole = self.exchange.gather_rows(first, self.lengths[name])
            found[name] = whole.transpose(0, 1).contiguous()
        return found

    def collected(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """All rows of one vector, in main memory, on every process."""
        return {name: self.gathered({name: part[None]})[name][0].cpu() for name, part in v.items()}

    def own(self, V: Mapping[str, Tensor | Divided]) -> Vectors:
        """The rows that are here, of vectors that are whole or divided alike."""
        return {name: self._own(name, part) for name, part in V.items()}

    def _own(self, name: str, part: Tensor | Divided) -> Tensor:
        if isinstance(part, Divided):
            return part.own
        return part[:, self.rows[name].start : self.rows[name].stop].clone() if name in self.rows else part

    @contextmanager
    def exchanged(
        self, V: Vectors, sums: Vectors, held: Set[str]
    ) -> Iterator[tuple[Vectors, Vectors, Callable[[], None]]]:
        """V whose parts are gathered when they are asked for, and what adds to the rows of `sums` that each process has.

        Parts named in `held` are gathered once, and added once, by the function that comes third. Inside, processes need not
        ask for the same, but all have to have finished before any leaves.
        """
        count, names = vectors.count(V), list(self.rows)
        forms = [ByRows(self.lengths[name]) for name in names] * count
        read, write = (
            self.exchange.register(Table([X[name][k] for k in range(count) for name in names], forms))
            for X in (V, sums)
        )
        places = {(name, k): k * len(names) + i for i, name in enumerate(names) for k in range(count)}
        brought: dict[tuple[str, int], Tensor] = {}
        given: dict[tuple[str, int], Tensor] = {}

        def bring(names: Sequence[str], k: int) -> Vectors:
            missing = [name for name in names if name in self.rows and (name, k) not in brought]
            found = dict(zip(missing, self.exchange.gather(read, [places[name, k] for name in missing]), strict=True))
            brought.update({(name, k): part for name, part in found.items() if name in held})
            return {
                name: V[name][k] if name not in self.rows else found[name] if name in found else brought[name, k]
                for name in names
            }

        def give(k: int, parts: Vectors) -> None:
            for name in parts.keys() - self.rows.keys():
                sums[name][k] += parts[name]
            divided = {name: part for name, part in parts.items() if name in self.rows}
            for name in divided.keys() & held:
                if (name, k) in given:
                    given[name, k] += divided[name]
                else:
                    given[name, k] = divided[name].to(sums[name].dtype, copy=True)
            self.exchange.add(write, {places[name, k]: part for name, part in divided.items() if name not in held})

        def give_rest() -> None:
            self.exchange.add(write, {places[at]: part for at, part in given.items()})
            given.clear()

        try:
            yield OnDemand(V, bring), Passed(V, give), give_rest
        finally:
            self.exchange.release(read)
            self.exchange.release(write)

    # ---- what a run keeps

    def kept(self, V: Vectors) -> dict[str, Tensor | Divided]:
        """Vectors as they go to a file: whole there, while each process has its rows."""
        return {name: self._kept(name, part) for name, part in V.items()}

    def _kept(self, name: str, part: Tensor, one: bool = False) -> Tensor | Divided:
        if name in self.rows:
            return Divided(part, self.rows[name], self.lengths[name], one)
        return part[0] if one else part

    def state_kept(self, state: Any) -> Any:
        """A nested state with all vectors in it as they go to a file."""
        leading = self._leading(state, whole=False)
        if leading == 1:
            return self.kept(state)
        if leading == 0:
            return {name: self._kept(name, part[None], one=True) for name, part in state.items()}
        if isinstance(state, dict):
            return {key: self.state_kept(value) for key, value in state.items()}
        return [self.state_kept(value) for value in state] if isinstance(state, list) else state

    def state_taken(self, outline: Any, take: Callable[[Outline, int], Tensor]) -> Any:
        """A nested state from what is in a file, of all vectors in it the rows that are here.

        Every process takes everything, some numbers at a time, and keeps what it holds; `take` finds the next ones of a tensor.
        """
        if isinstance(outline, Outline):
            return take(outline, math.prod(outline.shape)).view(outline.shape)
        if isinstance(outline, dict):
            leading = self._leading(outline, whole=True)
            return {
                key: self._rows_taken(self.rows[key], x, take, one=leading == 0)
                if leading is not None and key in self.rows
                else self.state_taken(x, take)
                for key, x in outline.items()
            }
        return [self.state_taken(x, take) for x in outline] if isinstance(outline, list) else outline

    def _rows_taken(self, rows: Rows, x: Outline, take: Callable[[Outline, int], Tensor], one: bool) -> Tensor:
        count, length, *rest = (1, *x.shape) if one else x.shape
        width = math.prod(rest)
        step = max(1, _TAKEN // max(1, width * x.dtype.itemsize))
        own = torch.empty(count, rows.stop - rows.start, *rest, dtype=x.dtype)
        for k in range(count):
            for start in range(0, length, step):
                stop = min(start + step, length)
                piece = take(x, (stop - start) * width).view(stop - start, *rest)
                first, last = max(start, rows.start), min(stop, rows.stop)
                if first < last:
                    own[k, first - rows.start : last - rows.start] = piece[first - start : last - start]
        return own[0] if one else own

    def _leading(self, state: Any, whole: bool) -> int | None:
        """Axes before the parameters' own: 1 of vectors, 0 of a single one, of all parameters or some; None for another state."""
        if not isinstance(state, dict) or not all(isinstance(part, (Tensor, Outline)) for part in state.values()):
            return None
        if not state.keys() & self.rows.keys() or not state.keys() <= self._shapes[whole].keys():
            return None
        shapes = {name: tuple(part.shape) for name, part in state.items()}
        expected = {name: self._shapes[whole][name] for name in state}
        if shapes == expected:
            return 0
        return 1 if {name: shape[1:] for name, shape in shapes.items() if shape} == expected else None


def local_part(c: Coordinates, part: Tensor) -> Tensor:
    """The rows that are here of one vector's part, given whole or as a DTensor."""
    if hasattr(part, "to_local"):
        with torch.no_grad():
            if c.rows is not None and _by_rows(part, c.rows) == tuple(part.placements):  # type: ignore[attr-defined]
                local: Tensor = part.to_local()
                return local
            part = part.full_tensor()  # type: ignore[attr-defined]
    return part if c.rows is None else part[c.rows.start : c.rows.stop]


def as_dtensor(like: Tensor, local: Tensor, rows: Rows | None) -> Tensor:
    """A DTensor placed as another one, from the rows that are here, or from all of them; every process takes part."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    form: Any = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    whole = local
    if rows is not None:
        if (by_rows := _by_rows(like, rows)) is not None:
            return DTensor.from_local(local, like.device_mesh, by_rows, **form).redistribute(placements=like.placements)
        whole = rows.exchange.gather_rows(local, like.shape[0])
    return DTensor.from_local(whole[box_of(like)].contiguous(), like.device_mesh, like.placements, **form)


def _by_rows(like: Any, rows: Rows) -> tuple[Any, ...] | None:
    """Placements that divide rows among the processes that a DTensor is divided among; None where these are not the rows'."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard

    divided = divided_along(like)
    at = divided[0] if divided else len(like.placements) - 1
    # Along another dimension of the mesh there may be as many processes, which hold other rows.
    among, ours = (dist.get_process_group_ranks(g) for g in (like.device_mesh.get_group(at), rows.exchange.group))
    if len(divided) > 1 or among != ours:
        return None
    return tuple(Shard(0) if i == at else Replicate() for i in range(len(like.placements)))
