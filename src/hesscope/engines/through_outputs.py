"""Products J^T M J v through the model's outputs z(theta), with J = dz / d theta and any matrix M on the outputs.

J^T u is linear in u, so that its derivative along v in u is J v: a reverse pass through the graph of a reverse pass (2
forward passes), as exact as J^T itself (2). Both graphs are built once, at u = 0 (3). Everything that the inner pass
saves of u's way back is then exactly zero and is kept as such, without memory: what stays is one graph of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesscope.arithmetic import linear_passes
from hesscope.engines.base import Engine, Linearization, parameter_values
from hesscope.engines.forward_rules import Replacing
from hesscope.engines.output_tails import Middle, split_outputs
from hesscope.engines.reverse_over_reverse import (
    SavedBytes,
    missing_derivatives_in_words,
    require_second_derivative,
)
from hesscope.engines.second_derivatives import WRITTEN_OUT
from hesscope.models import Reload, elsewhere
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

INSTEAD = "replace that part of the model by one whose backward pass can be differentiated"


class ThroughOutputs(Engine):
    """Exact, for every model whose operations have second derivatives."""

    name = "reverse-over-reverse"
    build_units = 3.0
    product_units = 4.0

    def __init__(self, middle: Middle, asked: bool = True) -> None:
        self.middle, self.asked = middle, asked
        self.note = "" if asked else f"{self.name}: where nothing else is asked for"

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        return _OutputGraph(problem, b, space, self.middle)


class _OutputGraph(Linearization):
    """One batch's outputs z, the graph of J^T u at u = 0, and M."""

    gradient_units = 2.0

    def __init__(self, problem: Problem, b: int, space: Space, middle: Middle) -> None:
        self._space = space
        self._leaves = {name: p.requires_grad_() for name, p in parameter_values(problem, space).items()}
        saved = SavedWithoutZeros(SavedBytes(problem.model.parameters(), elsewhere(problem.model)))
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        with torch.enable_grad(), Replacing(WRITTEN_OUT), hooks:
            z, tail_of = split_outputs(
                problem, b, middle, self._leaves,
                lambda: problem.outputs(b, self._leaves), lambda function: problem.run(function, b, self._leaves),
            )  # fmt: skip
            saved.backward = True
            self._pull_back(z)
        self._z = z.detach()
        with torch.no_grad():
            self._tail = tail_of(self._z)
        self.unused = [
            name for name, w in zip(self._leaves, self._w, strict=True) if w is None and name not in self._tail.names
        ]
        self.total, self.head = self._tail.total, self._tail.note
        self.bytes = saved.bytes + self._z.nbytes + self._tail.bytes

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
                below, parts = self._tail.gradient()
            self._add(parts, result, 0)
            self._add_transposed(below, result, 0, retain_graph=True)
        return result

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        count = vectors.count(V)
        for k in range(count if len(self.unused) < len(self._leaves) else 0):
            retain_graph = not (last and k == count - 1)
            own = {
                c.name: c.scatter(V[c.name][k]).to(self._leaves[c.name].device, c.dtype)
                for c in self._space.coordinates
                if c.name in self._tail.names
            }
            with linear_passes():
                Jv = self._times(V, k, retain_graph)
                with torch.no_grad():
                    below, parts = self._tail.product(Jv, own)
                self._add(parts, into, k)
                self._add_transposed(below, into, k, retain_graph)

    def _times(self, V: Vectors, k: int, retain_graph: bool) -> Tensor | None:
        """J v for the k-th vector, up to z; None is zero."""
        used = [(c, w, p) for c, w, p in zip(self._space.coordinates, self._w, self._leaves.values(), strict=True) if w]
        if not used:
            return None
        with missing_derivatives_in_words(INSTEAD):
            (Jv,) = torch.autograd.grad(
                [w for _, w, _ in used],
                [self._u],
                [c.scatter(V[c.name][k]).to(p.device, p.dtype) for c, _, p in used],
                retain_graph=retain_graph,
                materialize_grads=True,
            )
        return Jv

    def _add_transposed(self, u: Tensor, into: Vectors, k: int, retain_graph: bool) -> None:
        """Add J^T u to the k-th vector, for J up to z."""
        if all(w is None for w in self._w):
            return
        parts = torch.autograd.grad(
            [self._z_edge],
            list(self._leaves.values()),
            [u.to(self._z.dtype)],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        self._add({name: part for name, part in zip(self._leaves, parts, strict=True) if part is not None}, into, k)

    def _add(self, parts: dict[str, Tensor], into: Vectors, k: int) -> None:
        for c in self._space.coordinates:
            if c.name in parts:
                into[c.name][k] += c.gather(parts[c.name]).to(c.device)


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

    def pack(self, tensor: Tensor) -> Tensor | Reload | _Zeros:
        if self.backward and not self._meter.knows(tensor) and not bool(tensor.detach().any()):
            return _Zeros(tensor.detach().new_zeros(()), tensor.shape)
        return self._meter.pack(tensor)

    def unpack(self, packed: Tensor | Reload | _Zeros) -> Tensor:
        return packed.zero.expand(packed.shape) if isinstance(packed, _Zeros) else self._meter.unpack(packed)
