"""A meter of memory and work: which storages are alive, and what the operations of a run multiply and touch.

It watches every operation below autograd, where nothing is left that is made of other operations. A storage counts from the
operation that returns it to the moment when its last tensor goes, so that the peak is that of an allocator without any
waste. Tensors may be real or on the meta device (`execute`); the count is the same.
"""

from __future__ import annotations

import sys
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hesscope.dryrun.kinds import Kind, form_of, kind_of

#: Added in a trace to the size of memory that is mapped, and that counts part by part as it is written to.
MAPPED = 2**60
_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided}
#: Runs one operation: function, arguments, keywords.
Execute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Work:
    """What a run does: floating-point operations of matrix products, bytes that operations read or write, operations.

    And how many operations there are of every kind, where that was counted.
    """

    flops: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0
    kinds: Mapping[Kind, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.operations + other.operations,
            Counter(self.kinds) + Counter(other.kinds),
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.flops - other.flops,
            self.bytes - other.bytes,
            self.operations - other.operations,
            Counter(self.kinds) - Counter(other.kinds),
        )


def execute_as_is(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the tensors that it is given."""
    return func(*args, **kwargs)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; what was alive before counts as nothing. Without `kinds` these are not counted.

    Memory of at least `mapped` bytes that an operation leaves empty counts as it is written to: the system gives a page when it is
    first touched.

    Attributes:
        live: bytes of the storages that have come up and are still alive.
        peak: the most of them at any time.
        trace: the storages' sizes as they came up, -k where the k-th of them went, and 0 at every `mark`.
    """

    def __init__(self, execute: Execute = execute_as_is, kinds: bool = True, mapped: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._execute, self._counts_kinds = execute, kinds
        self._mapped = sys.maxsize if mapped is None else mapped
        self._known: set[int] = set()
        #: Of the storages that count as they are written to: bytes and numbers of the parts that were, by their place.
        self._written: dict[int, dict[tuple[int, int], tuple[int, int]]] = {}
        self._flops = self._bytes = self._operations = 0.0
        self._kinds: Counter[Kind] = Counter()
        self._allocations = 0
        self.live, self.peak, self.trace = 0, 0, array("q")

    @property
    def work(self) -> Work:
        """So far."""
        return Work(self._flops, self._bytes, self._operations, self._kinds.copy())

    def mark(self) -> None:
        """End a section of the trace."""
        self.trace.append(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._execute(func, args, kwargs)
        outputs = tensors(result)
        if not outputs:
            return result
        inputs = tensors(*args, *kwargs.values())
        empty = func._overloadpacket in _EMPTY
        for x in outputs:
            self._see(x, inputs, empty)
        if not func.is_view:
            multiplies = flop_registry.get(func._overloadpacket)
            if multiplies is not None:
                self._flops += multiplies(*args, **kwargs, out_val=result)
            if self._written and not empty:
                for x in outputs:
                    self._write(x)
            self._bytes += sum(form_of(x).nbytes for x in (*inputs, *outputs))
            self._operations += 1.0
            if self._counts_kinds:
                self._kinds[kind_of(func, args, kwargs)] += 1
        return result

    def _see(self, x: Tensor, inputs: list[Tensor], empty: bool) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        if size == 0 or any(y.untyped_storage()._cdata == key for y in inputs):
            weakref.finalize(storage, self._known.discard, key).atexit = False
            return
        if empty and size >= self._mapped:
            self._written[key] = {}
            weakref.finalize(storage, self._forget_written, key).atexit = False
            return
        weakref.finalize(storage, self._forget, key, size, self._count(size, 0)).atexit = False

    def _count(self, size: int, mark: int) -> int:
        """The number of an allocation."""
        self._allocations += 1
        self.trace.append(size + mark)
        self.live += size
        self.peak = max(self.peak, self.live)
        return self._allocations

    def _write(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        parts = self._written.get(storage._cdata)
        if parts is None:
            return
        rest = storage.nbytes() - sum(size for size, _ in parts.values())
        place = int(x.storage_offset()), x.numel()
        if rest > 0 and place not in parts:
            size = min(form_of(x).nbytes, rest)
            parts[place] = size, self._count(size, MAPPED)

    def _forget(self, key: int, size: int, number: int) -> None:
        self._known.discard(key)
        self.trace.append(-number)
        self.live -= size

    def _forget_written(self, key: int) -> None:
        self._known.discard(key)
        for size, number in self._written.pop(key).values():
            self.trace.append(-number)
            self.live -= size


def tensors(*groups: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results: these are flat, but for lists of tensors."""
    found: list[Tensor] = []
    for x in groups:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found
