"""Products J^T M J v through the model's outputs z(theta), with J = dz / d theta and any matrix M on the outputs.

J^T u is linear in u, so that its derivative along v in u is J v: a reverse pass through the graph of a reverse pass (2
forward passes), as exact as J^T itself (2). Both graphs are built once, at u = 0 (3). Everything that the inner pass
saves of u's way back is then exactly zero and is kept as such, without memory: what stays is one graph of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesscope.engines.base import Engine, Linearization, parameter_values
from hesscope.engines.reverse_over_reverse import (
    SavedBytes,
    missing_derivatives_in_words,
    require_second_derivative,
)
from hesscope.losses import residual
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

#: (problem, batch, outputs) to the function u -> M u, both shaped like the outputs.
Middle = Callable[[Problem, int, Tensor], Callable[[Tensor], Tensor]]

INSTEAD = "replace that part of the model by one whose backward pass can be differentiated"


class ThroughOutputs(Engine):
    """Exact, for every model whose operations have second derivatives."""

    name = "reverse-over-reverse"
    build_units = 3.0
    product_units = 4.0

    def __init__(self, middle: Middle, note: str = "") -> None:
        self.middle, self.note = middle, note

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        return _OutputGraph(problem, b, space, self.middle)


class _OutputGraph(Linearization):
    """One batch's outputs z, the graph of J^T u at u = 0, and M."""

    gradient_units = 2.0

    def __init__(self, problem: Problem, b: int, space: Space, middle: Middle) -> None:
        self._problem, self._b, self._space = problem, b, space
        self._leaves = {name: p.requires_grad_() for name, p in parameter_values(problem, space).items()}
        saved = SavedWithoutZeros(SavedBytes(problem.model.parameters()))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            z = problem.outputs(b, self._leaves)
            saved.backward = True
            self._pull_back(z)
        self._z = z.detach()
        self.unused = [name for name, w in zip(self._leaves, self._w, strict=True) if w is None]
        with torch.no_grad():
            self.total = float(problem.total_of_outputs(b, self._z))
            self._multiply = middle(problem, b, self._z)
        self.bytes = saved.bytes + self._z.nbytes

    def _pull_back(self, z: Tensor) -> None:
        """Build J^T u at u = 0; of its parts only their places in the graph are kept, for they are zero."""
        # One zero in memory, seen at every place.
        self._u = z.new_zeros(()).expand(z.shape).detach().requires_grad_()
        self._w: list[GradientEdge | None] = [None] * len(self._leaves)
        if z.requires_grad:
            self._z_edge = get_gradient_edge(z)
            parts = torch.autograd.grad(z, list(self._leaves.values()), self._u, create_graph=True, allow_unused=True)
            require_second_derivative(parts, INSTEAD)
            self._w = [None if w is None else get_gradient_edge(w) for w in parts]

    def gradient(self) -> Vectors:
        result = self._space.zeros()
        if len(self.unused) < len(self._leaves):
            with torch.no_grad():
                r = residual(self._problem.loss, self._z, self._problem.on_device(self._b))  # type: ignore[arg-type]
            self._add_transposed(r, result, 0, retain_graph=True)
        return result

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        count = vectors.count(V)
        for k in range(count if len(self.unused) < len(self._leaves) else 0):
            retain_graph = not (last and k == count - 1)
            with torch.no_grad():
                middle = self._multiply(self._times(V, k, retain_graph))
            self._add_transposed(middle, into, k, retain_graph)

    def _times(self, V: Vectors, k: int, retain_graph: bool) -> Tensor:
        """J v for the k-th vector."""
        used = [(c, w, p) for c, w, p in zip(self._space.coordinates, self._w, self._leaves.values(), strict=True) if w]
        with missing_derivatives_in_words(INSTEAD):
            (Jv,) = torch.autograd.grad(
                [w for _, w, _ in used],
                [self._u],
                [c.scatter(V[c.name][k]).to(p.dtype) for c, _, p in used],
                retain_graph=retain_graph,
                materialize_grads=True,
            )
        return Jv

    def _add_transposed(self, u: Tensor, into: Vectors, k: int, retain_graph: bool) -> None:
        """Add J^T u to the k-th vector."""
        parts = torch.autograd.grad(
            [self._z_edge],
            list(self._leaves.values()),
            [u.to(self._z.dtype)],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        for c, part in zip(self._space.coordinates, parts, strict=True):
            if part is not None:
                into[c.name][k] += c.gather(part)


@dataclass(frozen=True)
class _Zeros:
    """An all-zero tensor: its one value and its shape."""

    zero: Tensor
    shape: torch.Size


class SavedWithoutZeros:
    """Counts what autograd saves; a tensor that the backward pass adds and that is zero throughout takes no memory."""

    def __init__(self, meter: SavedBytes) -> None:
        self._meter = meter
        self.backward = False

    @property
    def bytes(self) -> int:
        return self._meter.bytes

    def pack(self, tensor: Tensor) -> Tensor | _Zeros:
        if self.backward and not self._meter.knows(tensor) and not bool(tensor.detach().any()):
            return _Zeros(tensor.detach().new_zeros(()), tensor.shape)
        return self._meter.pack(tensor)

    def unpack(self, packed: Tensor | _Zeros) -> Tensor:
        return packed.zero.expand(packed.shape) if isinstance(packed, _Zeros) else self._meter.unpack(packed)
