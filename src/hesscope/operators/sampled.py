"""A random part of an operator that is a sum over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hesscope.communicator import Communicator
from hesscope.errors import HesscopeError
from hesscope.operators.base import Operator
from hesscope.space import Space, Vectors, vectors
from hesscope.space.random import normals, stream_key


class OverBatches(Protocol):
    """An operator whose products are sums over batches."""

    space: Space
    positive_semidefinite: bool
    products: int

    @property
    def units(self) -> float: ...

    @property
    def tolerance(self) -> float: ...

    @property
    def comm(self) -> Communicator: ...

    def describe(self) -> dict[str, Any]: ...

    def origin(self) -> dict[str, Any] | None: ...

    def product_over(self, batches: Sequence[int], V: Vectors) -> Vectors:
        """The part of A V that these batches contribute, with the divisor of the whole."""


class Sampled(Operator):
    """(B / s) times what s of B batches contribute: unbiased for the whole where the s are drawn uniformly.

    Its cost is counted by the whole operator.
    """

    def __init__(self, whole: OverBatches, chosen: Sequence[int], total: int) -> None:
        super().__init__(whole.space, whole.positive_semidefinite)
        self._whole, self._chosen, self._total = whole, tuple(chosen), total

    def _matmat(self, V: Vectors) -> Vectors:
        self._whole.products += vectors.count(V)
        result = self._whole.product_over(self._chosen, V)
        vectors.scale_(result, self._total / len(self._chosen))
        return result

    @property
    def tolerance(self) -> float:
        return self._whole.tolerance

    @property
    def units(self) -> float:
        return self._whole.units

    @property
    def comm(self) -> Communicator:
        return self._whole.comm

    def describe(self) -> dict[str, Any]:
        return {"operator": "sampled", "batches": list(self._chosen), "of": self._whole.describe()}

    def origin(self) -> dict[str, Any] | None:
        return self._whole.origin()


def sample(whole: OverBatches, total: int, count: int, seed: int, draw: int) -> Sampled:
    """`count` of `total` batches, drawn without replacement for this seed and draw; raises HesscopeError for a count outside."""
    if not 1 <= count <= total:
        raise HesscopeError(f"Expected batches between 1 and {total}, the number the problem has, got {count}.")
    keys = normals(stream_key(seed, "batches", draw), torch.arange(total))
    return Sampled(whole, sorted(keys.argsort()[:count].tolist()), total)
