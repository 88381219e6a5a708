"""Rows of tensors that processes hold between them, gathered and summed when one of them asks.

Processes that work on different data ask for the same weights at about the same time, but one may have less to do, or stop early.
So nothing is agreed on beforehand: in every round each process says what it wants, nothing if it has finished; all take part in
what the largest of these wishes needs, and who wanted something else asks again. Processes that do the same work ask as one, and a
round then costs a number beside what it moves. A process that waits for the others in any other way first has to `serve`.

What is wanted is a run of tensors that follow one another in a table, such as the weights of a block: small ones travel together.

Vectors are divided by rows as `torch.distributed.fsdp.fully_shard` divides them, weights in any way; sums are of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: The most tensors of a table, and of a run.
_PARTS, _RUN = 2**24, 2**10
#: Tensors of a run have at most so many bytes together; a larger one travels alone, where it needs no packing.
_PACKED = 32 * 2**20
# Their names from torch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_GATHER, _ADD = 1, 2


@dataclass(frozen=True)
class ByRows:
    """A tensor of so many rows, ceil(count / processes) of them with each process, the last ones fewer or none."""

    count: int

    def shape(self, own: Tensor) -> tuple[int, ...]:
        """Of all of it."""
        return self.count, *own.shape[1:]

    def sent(self, own: Tensor, size: int) -> Tensor:
        """What a process of so many sends, as many numbers as any other."""
        return _padded(own, _share(self.count, size) * math.prod(own.shape[1:]))

    def whole(self, received: Tensor, own: Tensor, size: int) -> Tensor:
        """All of it, from what every process has sent, [size, numbers]."""
        return received.reshape(size * _share(self.count, size), *own.shape[1:])[: self.count]


@dataclass(frozen=True)
class Boxes:
    """A tensor of which each process, in their order, has a box; several may have the same one."""

    extent: tuple[int, ...]
    boxes: tuple[tuple[slice, ...], ...]

    def shape(self, own: Tensor) -> tuple[int, ...]:
        """Of all of it."""
        return self.extent

    def sent(self, own: Tensor, size: int) -> Tensor:
        """What a process sends, as many numbers as any other."""
        return _padded(own, max(math.prod(_extent(box)) for box in self.boxes))

    def whole(self, received: Tensor, own: Tensor, size: int) -> Tensor:
        """All of it, from what every process has sent."""
        found = received.new_empty(self.extent)
        for box, numbers in zip(self.boxes, received, strict=True):
            extent = _extent(box)
            found[box] = numbers[: math.prod(extent)].view(extent)
        return found


def _share(rows: int, size: int) -> int:
    """The most rows that a process has."""
    return -(-rows // size)


def _extent(box: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)


def _padded(own: Tensor, numbers: int) -> Tensor:
    """A tensor's numbers, and zeros up to so many."""
    flat = own.reshape(-1)
    return flat if len(flat) == numbers else torch.cat([flat, flat.new_zeros(numbers - len(flat))])


@dataclass(frozen=True)
class Table:
    """Tensors of which this process holds some, and how each is divided."""

    parts: Sequence[Tensor]
    forms: Sequence[ByRows | Boxes]

    def nbytes(self, part: int) -> int:
        """Of all of a tensor."""
        own = self.parts[part]
        return math.prod(self.forms[part].shape(own)) * own.itemsize


class Exchange:
    """The processes of a group that hold rows of the same tensors. All of them register the same tables in the same order.

    Attributes:
        wait: how to wait for a collective.
        replicas: where the rows are held several times, the group of those that hold the same; else None.
        root: which of them collects what goes to a file; None where another group's does, and nothing is collected here.
        layout: what divides the weights, for the record of a result.
        failed: what to raise, in place of an exception, where the others are left in the middle of a round.
        moved_bytes: what this process has received in gathers and sent in sums so far, at the least that either takes.
        rounds: how many rounds there were.
    """

    def __init__(self, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None = None) -> None:
        self.group, self.replicas = group, replicas
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        cuda = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self._tables: dict[int, Table] = {}
        self._made = 0
        self.root: int | None = 0
        self.layout: dict[str, Any] = {"layout": "fully sharded"}
        self.wait: Callable[[Any], object] = lambda work: work.wait()
        self.failed: Callable[[Exception], BaseException] = lambda error: error
        self.moved_bytes, self.rounds = 0, 0

    def describe(self) -> dict[str, Any]:
        """How the weights are divided, for the record of a result, as JSON."""
        found = {**self.layout, "shards": self.size}
        if self.replicas is None:
            return found
        hybrid = {"layout": "hybrid sharded"} if found["layout"] == "fully sharded" else {}
        return found | hybrid | {"replicas": dist.get_world_size(self.replicas)}

    def bare(self) -> Exchange:
        """The same processes, without their tables."""
        found = copy(self)
        found._tables = {}
        return found

    def register(self, table: Table) -> int:
        """A number for a table, until it is released."""
        self._made += 1
        self._tables[self._made] = table
        return self._made

    def release(self, number: int) -> None:
        """Let go of a table."""
        del self._tables[number]

    def gather(self, number: int, parts: Sequence[int]) -> list[Tensor]:
        """All of some parts, each new or (of one process) its own."""
        found: dict[int, Tensor] = {}
        for run in self._runs(number, parts):
            wholes = self._until(_code(number, run, _GATHER), None)
            assert wholes is not None
            found |= zip(run, wholes, strict=True)
        return [found[part] for part in parts]

    def gather_rows(self, own: Tensor, rows: int) -> Tensor:
        """All rows of one tensor that is in no table; all processes call it."""
        number = self.register(Table([own], [ByRows(rows)]))
        (whole,) = self.gather(number, [0])
        self.release(number)
        return whole

    @property
    def collects(self) -> bool:
        """Whether it is this process that collects."""
        return self.rank == self.root

    def collect(self, own: Tensor, rows: int) -> Tensor | None:
        """All rows of one tensor on the process that collects, None on others; all processes call it, in step."""
        if self.root is None or self.size == 1:
            return own if self.collects else None
        try:
            return self._collected(own, ByRows(rows))
        except Exception as error:
            raise self.failed(error) from error

    def _collected(self, own: Tensor, form: ByRows) -> Tensor | None:
        mine = form.sent(own.to(self._device), self.size)
        found = mine.new_empty(self.size, len(mine)) if self.collects else None
        if mine.numel():
            into = None if found is None else [part.view(torch.uint8) for part in found]
            work = dist.gather(mine.view(torch.uint8), into, group=self.group, group_dst=self.root, async_op=True)
            self.wait(work)
        if found is None:
            return None
        self.moved_bytes += found.nbytes - mine.nbytes
        return form.whole(found, own, self.size)

    def add(self, number: int, wholes: Mapping[int, Tensor]) -> None:
        """Add to the rows that each process holds of some parts, which are divided by rows."""
        for run in self._runs(number, list(wholes)):
            self._until(_code(number, run, _ADD), [wholes[part] for part in run])

    def _runs(self, number: int, parts: Sequence[int]) -> Iterator[range]:
        """Parts, in the order of the table, in runs that travel together."""
        table = self._tables[number]
        start, stop, size = 0, 0, 0
        for part in sorted(parts):
            more, kind = table.nbytes(part), table.parts[part].dtype
            follows = stop > start and part == stop and part - start < _RUN and kind == table.parts[start].dtype
            if follows and size + more <= _PACKED:
                stop, size = part + 1, size + more
                continue
            if stop > start:
                yield range(start, stop)
            start, stop, size = part, part + 1, more
        if stop > start:
            yield range(start, stop)

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors; all of them call it, and serve before."""
        if self.size == 1:
            return x
        self.serve()
        found = x.to(self._device, copy=True)
        self.wait(dist.all_reduce(found, group=self.group, async_op=True))
        return found.to(x.device)

    def total_of_replicas(self, tensors: Iterable[Tensor]) -> None:
        """Sum in place over the processes that hold the same rows; all of them call it, and serve before."""
        for x in tensors if self.replicas is not None else ():
            moved = x.to(self._device)
            self.wait(dist.all_reduce(moved, group=self.replicas, async_op=True))
            self.moved_bytes += 2 * moved.nbytes
            if moved is not x:
                x.copy_(moved)

    def serve(self) -> None:
        """Take part in what the others want, until all have finished."""
        while self.size > 1 and self._round(0, None)[0]:
            pass

    def _until(self, code: int, wholes: Sequence[Tensor] | None) -> list[Tensor] | None:
        if self.size == 1:
            return self._done(code, wholes)
        while True:
            served, found = self._round(code, wholes)
            if served == code:
                return found

    def _round(self, code: int, wholes: Sequence[Tensor] | None) -> tuple[int, list[Tensor] | None]:
        """What was done, 0 for nothing, and what was gathered."""
        wish = torch.tensor([code], dtype=torch.int64, device=self._device)
        self.wait(dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.group, async_op=True))
        chosen = int(wish)
        if chosen == 0:
            return 0, None
        self.rounds += 1
        try:
            return chosen, self._done(chosen, wholes if chosen == code else None)
        except Exception as error:
            raise self.failed(error) from error

    def _done(self, code: int, wholes: Sequence[Tensor] | None) -> list[Tensor] | None:
        number, run, kind = _decoded(code)
        table = self._tables[number]
        own, forms = [table.parts[part] for part in run], [table.forms[part] for part in run]
        if kind == _GATHER:
            return self._gathered(own, forms)
        self._added(own, [form.shape(x)[0] for x, form in zip(own, forms, strict=True)], wholes)
        return None

    def _gathered(self, own: Sequence[Tensor], forms: Sequence[ByRows | Boxes]) -> list[Tensor]:
        if self.size == 1:
            return list(own)
        mine = [form.sent(x.to(self._device), self.size) for x, form in zip(own, forms, strict=True)]
        packed = mine[0] if len(mine) == 1 else torch.cat(mine)
        found = packed.new_empty(self.size, len(packed))
        self.wait(_all_gather(found.view(-1), packed, group=self.group, async_op=True))
        self.moved_bytes += found.nbytes - packed.nbytes
        parts = torch.split(found, [len(x) for x in mine], 1)
        return [
            form.whole(part, x, self.size).to(x.device) for part, x, form in zip(parts, own, forms, strict=True)
        ]  # fmt: skip

    def _added(self, own: Sequence[Tensor], rows: Sequence[int], wholes: Sequence[Tensor] | None) -> None:
        if self.size == 1:
            assert wholes is not None
            for x, whole in zip(own, wholes, strict=True):
                x += whole
            return
        each = [_share(n, self.size) for n in rows]
        sizes = [n * math.prod(x.shape[1:]) for n, x in zip(each, own, strict=True)]
        packed = torch.zeros(self.size, sum(sizes), dtype=own[0].dtype, device=self._device)
        for part, n, whole in zip(torch.split(packed, sizes, 1), each, wholes or (), strict=wholes is not None):
            for rank in range(self.size):
                some = whole[rank * n : (rank + 1) * n]
                part[rank, : some.numel()] = some.reshape(-1)
        mine = self._scattered(packed)
        self.moved_bytes += packed.nbytes - mine.nbytes
        for x, part in zip(own, torch.split(mine, sizes), strict=True):
            x += part[: x.numel()].view(x.shape).to(x.device)

    def _scattered(self, packed: Tensor) -> Tensor:
        """Of what all processes have for each, [size, numbers], the sum for this one."""
        if self._device.type == "cuda":
            mine = packed.new_empty(packed.shape[1])
            self.wait(_reduce_scatter(mine, packed.view(-1), group=self.group, async_op=True))
            return mine
        # Gloo's reduce_scatter sends all sums to all; this sends each process what it will sum.
        received = torch.empty_like(packed)
        self.wait(dist.all_to_all_single(received, packed, group=self.group, async_op=True))
        return received.sum(0)


def _code(number: int, run: range, kind: int) -> int:
    return ((number * _PARTS + run.start) * _RUN + len(run) - 1) * 4 + kind


def _decoded(code: int) -> tuple[int, range, int]:
    rest, kind = divmod(code, 4)
    rest, count = divmod(rest, _RUN)
    number, start = divmod(rest, _PARTS)
    return number, range(start, start + count + 1), kind


def divided_along(tensor: Any) -> list[int]:
    """The dimensions of its mesh along which a DTensor is divided."""
    return [i for i, place in enumerate(tensor.placements) if hasattr(place, "dim")]


def box_of(tensor: Any) -> tuple[slice, ...]:
    """Where what this process holds of a DTensor is in all of it."""
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(at, at + length) for at, length in zip(chunk.offsets, chunk.sizes, strict=True))


def own_rows(rows: int, rank: int, size: int) -> slice:
    """The rows that a process holds."""
    each = _share(rows, size)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))
