"""A meter of memory and work: which storages are alive, and what the operations of a run multiply and touch.

It watches every operation below autograd, where nothing is left that is made of other operations. A storage counts from the
operation that returns it to the moment when its last tensor goes, so that the peak is that of an allocator without any
waste. Tensors may be real or on the meta device (`execute`); the count is the same.
"""

from __future__ import annotations

import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hesscope.dryrun.kinds import Kind, form_of, kind_of

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

    Attributes:
        live: bytes of the storages that have come up and are still alive.
        peak: the most of them at any time.
        trace: the storages' sizes as they came up, -k where the k-th of them went, and 0 at every `mark`.
    """

    def __init__(self, execute: Execute = execute_as_is, kinds: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._execute, self._counts_kinds = execute, kinds
        self._known: set[int] = set()
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
        for x in outputs:
            self._see(x, inputs)
        if not func.is_view:
            multiplies = flop_registry.get(func._overloadpacket)
            if multiplies is not None:
                self._flops += multiplies(*args, **kwargs, out_val=result)
            self._bytes += sum(form_of(x).nbytes for x in (*inputs, *outputs))
            self._operations += 1.0
            if self._counts_kinds:
                self._kinds[kind_of(func, args, kwargs)] += 1
        return result

    def _see(self, x: Tensor, inputs: list[Tensor]) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        if size == 0 or any(y.untyped_storage()._cdata == key for y in inputs):
            weakref.finalize(storage, self._known.discard, key).atexit = False
            return
        self._allocations += 1
        self.trace.append(size)
        weakref.finalize(storage, self._forget, key, size, self._allocations).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, number: int) -> None:
        self._known.discard(key)
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
