"""Reverse-over-reverse: differentiate the gradient's graph once more.

With g(theta) the gradient of the batch's sum, H v = d<g(theta), v>/d theta. The graph of g is built once (2 forward passes: of
the gradient in the weights of linear layers there is a graph alone; 3 for other weights); each product is a reverse pass
through it (6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hesscope.arithmetic import linear_passes
from hesscope.engines.base import Differential, Engine, Linearization, gradient_parts, parameter_values
from hesscope.engines.forward_rules import Replacing
from hesscope.engines.second_derivatives import WRITTEN_OUT
from hesscope.engines.valueless import VALUELESS
from hesscope.errors import HesscopeError
from hesscope.losses import head_loss, head_note
from hesscope.memory import storage_key
from hesscope.models import Offloaded, Reload, Sharded, elsewhere
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

    def gradient_alone(self, problem: Problem, b: int, space: Space) -> Differential:
        return _Gradient(problem, b, space)


class _Gradient(Differential):
    """The gradient of one batch's summed loss, by the operations that the graph is made of."""

    gradient_units = 3.0

    def __init__(self, problem: Problem, b: int, space: Space) -> None:
        self._space = space
        with Replacing(WRITTEN_OUT):
            self.total, self._parts = gradient_parts(
                problem, b, parameter_values(problem, space), head_loss(problem.loss)
            )
        self.unused = [name for name, part in self._parts.items() if part is None]

    def gradient(self) -> Vectors:
        result = self._space.zeros()
        for c in self._space.coordinates:
            part = self._parts[c.name]
            if part is not None:
                result[c.name][0] = c.gather(part)
        return result


class _GradientGraph(Linearization):
    """The differentiable gradient of one batch's summed loss with respect to the selected parameters.

    Products need the gradient's graph, not its values: linear layers leave those out.
    """

    gradient_units = 3.0

    def __init__(self, problem: Problem, b: int, space: Space) -> None:
        self._problem, self._b, self._space = problem, b, space
        self._loss = head_loss(problem.loss)
        self._leaves = {name: p.requires_grad_() for name, p in parameter_values(problem, space).items()}
        meter = SavedBytes(problem.model.parameters(), elsewhere(problem.model))
        hooks = torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack)
        with torch.enable_grad(), Replacing(VALUELESS), hooks:
            total, _ = problem.total(b, self._leaves, loss=self._loss)
            gradients = self._differentiate(total)
        require_second_derivative(gradients)
        # Constant parts of the gradient (a loss linear in a parameter) have no graph and add nothing to products.
        self._curved = [
            (c, get_gradient_edge(g), g.dtype)
            for c, g in zip(space.coordinates, gradients, strict=True)
            if g is not None and g.requires_grad
        ]
        self.unused = [name for name, g in zip(self._leaves, gradients, strict=True) if g is None]
        self.total = float(total.detach())
        self.bytes = meter.bytes
        self.head = head_note(self._loss)

    def _differentiate(self, total: Tensor) -> list[Tensor | None]:
        """The gradient's parts; None for a parameter that this batch's loss does not use."""
        if not total.requires_grad:
            return [None] * len(self._leaves)
        return list(torch.autograd.grad(total, list(self._leaves.values()), create_graph=True, allow_unused=True))

    def gradient(self) -> Vectors:
        return _Gradient(self._problem, self._b, self._space).gradient()

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        count = vectors.count(V)
        for k in range(count if self._curved else 0):
            seeds = [c.scatter(V[c.name][k]).to(self._leaves[c.name].device, dtype) for c, _, dtype in self._curved]
            with missing_derivatives_in_words(), linear_passes():
                columns = list(
                    torch.autograd.grad(
                        [edge for _, edge, _ in self._curved],
                        list(self._leaves.values()),
                        grad_outputs=seeds,
                        retain_graph=not (last and k == count - 1),
                        allow_unused=True,
                    )
                )
            for c in reversed(self._space.coordinates):
                column = columns.pop()  # which goes as the sum grows
                if column is not None:
                    into[c.name][k] += c.gather(column).to(c.device)


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
    """Counts the bytes that autograd keeps while a graph is built: each storage once, the parameters' not at all.

    Of weights that were brought from elsewhere nothing is kept: they are brought again.
    """

    def __init__(self, parameters: object, brought: Offloaded | Sharded | None = None) -> None:
        self._seen = {storage_key(p) for p in parameters}  # type: ignore[attr-defined]
        self._brought = brought
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor | Reload:
        reload = self._brought.as_reload(tensor) if self._brought is not None else None
        if reload is not None:
            return reload
        key = storage_key(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self.bytes += tensor.untyped_storage().nbytes()
        # The tensor itself would tie a node to its own output, a cycle that nothing frees.
        return tensor.detach()

    def unpack(self, kept: Tensor | Reload) -> Tensor:
        if not isinstance(kept, Reload):
            return kept
        assert isinstance(self._brought, Offloaded)
        return self._brought.reloaded(kept)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is a parameter's or has been counted."""
        return storage_key(tensor) in self._seen
