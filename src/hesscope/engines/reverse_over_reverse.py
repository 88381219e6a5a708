"""Reverse-over-reverse: differentiate the gradient's graph once more.

With g(theta) the gradient of the batch's sum, H v = d<g(theta), v>/d theta. The graph of g is built once (3 forward
passes); each product is a reverse pass through it (6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hesscope.engines.base import Engine, Linearization, gradient_parts, parameter_values
from hesscope.errors import HesscopeError
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

INSTEAD = "use engine='finite-difference', or replace that part of the model"


class ReverseOverReverse(Engine):
    """The default engine: exact, for every model whose operations have second derivatives."""

    name = "reverse-over-reverse"
    build_units = 3.0
    product_units = 6.0

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        return _GradientGraph(problem, b, space)


class _GradientGraph(Linearization):
    """The differentiable gradient of one batch's summed loss with respect to the selected parameters.

    Products need the gradient's graph, not its values, which are as large as the parameters: the first product drops them.
    """

    def __init__(self, problem: Problem, b: int, space: Space) -> None:
        self._problem, self._b, self._space = problem, b, space
        self._leaves = {name: p.requires_grad_() for name, p in parameter_values(problem, space).items()}
        meter = SavedBytes(problem.model.parameters())
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
            total, _ = problem.total(b, self._leaves)
            gradients = self._differentiate(total)
        require_second_derivative(gradients)
        self._values: list[Tensor | None] | None = gradients
        # Constant parts of the gradient (a loss linear in a parameter) have no graph and add nothing to products.
        self._curved = [
            (c, get_gradient_edge(g), g.dtype)
            for c, g in zip(space.coordinates, gradients, strict=True)
            if g is not None and g.requires_grad
        ]
        self.unused = [name for name, g in zip(self._leaves, gradients, strict=True) if g is None]
        self.total = float(total.detach())
        self.bytes = meter.bytes

    def _differentiate(self, total: Tensor) -> list[Tensor | None]:
        """The gradient's parts; None for a parameter that this batch's loss does not use."""
        if not total.requires_grad:
            return [None] * len(self._leaves)
        return list(torch.autograd.grad(total, list(self._leaves.values()), create_graph=True, allow_unused=True))

    @property
    def gradient_units(self) -> float:  # type: ignore[override]
        return 0.0 if self._values is not None else 3.0

    def gradient(self) -> Vectors:
        result, values = self._space.zeros(), self._values
        if values is None:
            values = list(gradient_parts(self._problem, self._b, self._leaves)[1].values())
        for c, g in zip(self._space.coordinates, values, strict=True):
            if g is not None:
                result[c.name][0] = c.gather(g.detach())
        return result

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        self._values = None
        count = vectors.count(V)
        for k in range(count if self._curved else 0):
            seeds = [c.scatter(V[c.name][k]).to(dtype) for c, _, dtype in self._curved]
            with missing_derivatives_in_words():
                columns = torch.autograd.grad(
                    [edge for _, edge, _ in self._curved],
                    list(self._leaves.values()),
                    grad_outputs=seeds,
                    retain_graph=not (last and k == count - 1),
                    allow_unused=True,
                )
            for c, column in zip(self._space.coordinates, columns, strict=True):
                if column is not None:
                    into[c.name][k] += c.gather(column)


def require_second_derivative(gradients: Sequence[Tensor | None], instead: str = INSTEAD) -> None:
    """Raise HesscopeError where a custom function's backward says that it cannot be differentiated again.

    Its node would raise if the second backward pass came by; where no selected parameter lies beyond, autograd prunes it
    and the answer would silently lack that function's curvature. `instead` says what the caller may do.
    """
    nodes = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            raise HesscopeError(
                f"The model uses a custom autograd function whose backward cannot be differentiated again; {instead}."
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


@contextmanager
def missing_derivatives_in_words(instead: str = INSTEAD) -> Iterator[None]:
    """Torch names an operation without a second derivative; say what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error) and "not implemented" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise HesscopeError(
            f"The model uses an operation without a second derivative ({reason}); {instead}."
        ) from error


class SavedBytes:
    """Counts the bytes that autograd keeps while a graph is built: each storage once, the parameters' not at all."""

    def __init__(self, parameters: object) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in parameters}  # type: ignore[attr-defined]
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        # The tensor itself would tie a node to its own output, a cycle that nothing frees.
        return tensor.detach()

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is a parameter's or has been counted."""
        return tensor.untyped_storage().data_ptr() in self._seen
