"""Rows of tensors that processes hold between them, gathered and summed when one of them asks.

Processes that work on different data ask for the same weights at about the same time, but one may have less to do, or stop early.
So nothing is agreed on beforehand: in every round each process says what it wants, nothing if it has finished; all take part in
what the largest of these wishes needs, and who wanted something else asks again. Processes that do the same work ask as one, and a
round then costs a number beside what it moves. A process that waits for the others in any other way first has to `serve`.

Rows are divided as `torch.distributed.fsdp.fully_shard` divides them: ceil(rows / processes) each, the last ones fewer or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PARTS = 2**24
# Their names from torch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_GATHER, _ADD = 1, 2


@dataclass(frozen=True)
class Table:
    """Tensors of which this process holds some rows; `rows` are all of them."""

    parts: Sequence[Tensor]
    rows: Sequence[int]


class Exchange:
    """The processes of a group that hold rows of the same tensors. All of them register the same tables in the same order.

    Attributes:
        wait: how to wait for a collective.
        replicas: where the rows are held several times, the group of those that hold the same; else None.
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
        self.wait: Callable[[Any], object] = lambda work: work.wait()
        self.failed: Callable[[Exception], BaseException] = lambda error: error
        self.moved_bytes, self.rounds = 0, 0

    def register(self, table: Table) -> int:
        """A number for a table, until it is released."""
        self._made += 1
        self._tables[self._made] = table
        return self._made

    def release(self, number: int) -> None:
        """Let go of a table."""
        del self._tables[number]

    def gather(self, number: int, part: int) -> Tensor:
        """All rows of a part, new or (of one process) its own."""
        found = self._until(_code(number, part, _GATHER), None)
        assert found is not None
        return found

    def add(self, number: int, part: int, whole: Tensor) -> None:
        """Add to the rows that each process holds of a part."""
        self._until(_code(number, part, _ADD), whole)

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

    def _until(self, code: int, whole: Tensor | None) -> Tensor | None:
        if self.size == 1:
            return self._done(code, whole)
        while True:
            served, found = self._round(code, whole)
            if served == code:
                return found

    def _round(self, code: int, whole: Tensor | None) -> tuple[int, Tensor | None]:
        """What was done, 0 for nothing, and what was gathered."""
        wish = torch.tensor([code], dtype=torch.int64, device=self._device)
        self.wait(dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.group, async_op=True))
        chosen = int(wish)
        if chosen == 0:
            return 0, None
        self.rounds += 1
        try:
            return chosen, self._done(chosen, whole if chosen == code else None)
        except Exception as error:
            raise self.failed(error) from error

    def _done(self, code: int, whole: Tensor | None) -> Tensor | None:
        number, part, kind = code // _PARTS // 4, code // 4 % _PARTS, code % 4
        table = self._tables[number]
        own, rows = table.parts[part], table.rows[part]
        if kind == _GATHER:
            return self._gathered(own, rows)
        self._added(own, rows, whole)
        return None

    def _gathered(self, own: Tensor, rows: int) -> Tensor:
        if self.size == 1:
            return own
        each = -(-rows // self.size)
        mine = own.to(self._device).contiguous()
        if len(own) < each:
            mine = torch.cat([mine, mine.new_zeros(each - len(own), *own.shape[1:])])
        found = mine.new_empty(each * self.size, *own.shape[1:])
        self.wait(_all_gather(found, mine, group=self.group, async_op=True))
        self.moved_bytes += found.nbytes - mine.nbytes
        return found[:rows].to(own.device)

    def _added(self, own: Tensor, rows: int, whole: Tensor | None) -> None:
        if self.size == 1:
            assert whole is not None
            own += whole
            return
        each = -(-rows // self.size)
        padded = torch.zeros(each * self.size, *own.shape[1:], dtype=own.dtype, device=self._device)
        if whole is not None:
            padded[:rows] = whole
        mine = padded.new_empty(each, *own.shape[1:])
        self.wait(_reduce_scatter(mine, padded, group=self.group, async_op=True))
        self.moved_bytes += padded.nbytes - mine.nbytes
        own += mine[: len(own)].to(own.device)


def _code(number: int, part: int, kind: int) -> int:
    return (number * _PARTS + part) * 4 + kind


def own_rows(rows: int, rank: int, size: int) -> slice:
    """The rows that a process holds."""
    each = -(-rows // size)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))
