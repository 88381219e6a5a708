"""What linear layers receive and what comes back to them, position by position: the two halves of a weight's gradient.

A layer y_p = W a_p has, for the summed loss, the gradient  sum_p g_p a_p^T  in W, with g_p the derivative in y_p. The pairs
(a_p, g_p) are found without that gradient. Legend: P positions of a batch, c inputs, r output units.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesscope.engines.base import parameter_values
from hesscope.engines.linear_uses import as_linear
from hesscope.problem import Problem
from hesscope.space import Space

#: For every call of a layer: its inputs [P, c] and the derivatives in its outputs [P, r].
Pairs = list[tuple[Tensor, Tensor]]


class LayerGradients:
    """One batch's outputs z with their graph; for cotangents u of z, the pairs of every selected linear weight.

    The weights must be used by linear layers alone. Nothing else is differentiated, so that the graph begins at the first
    selected layer.
    """

    def __init__(self, problem: Problem, b: int, space: Space) -> None:
        values = parameter_values(problem, space)
        with torch.enable_grad(), _Tap(values) as tap:
            self._z = problem.outputs(b, values)
        self._taps = dict(tap.taps)

    @property
    def outputs(self) -> Tensor:
        """z, without its graph."""
        return self._z.detach()

    def pairs(self, u: Tensor, last: bool) -> dict[str, Pairs]:
        """The pairs for one cotangent; `last` lets the graph go. Calls that z does not depend on are left out."""
        leaves = [dy for taps in self._taps.values() for _, dy in taps]
        if not self._z.requires_grad or not leaves:
            return {}
        found = torch.autograd.grad(self._z, leaves, u.to(self._z.dtype), retain_graph=not last, allow_unused=True)
        gradient = dict(zip(map(id, leaves), found, strict=True))
        return {
            name: [(_rows(a), _rows(g)) for a, dy in taps if (g := gradient[id(dy)]) is not None]
            for name, taps in self._taps.items()
        }


class _Tap(TorchFunctionMode):
    """Keeps a layer's input and adds a leaf of zeros to its output, wherever a linear layer uses one of the weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self.taps: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        linear = as_linear(func, args, kwargs)
        name = None if linear is None else self._names.get(id(linear[1]))
        if linear is None or name is None:
            return result
        dy = torch.zeros_like(result, requires_grad=True)
        self.taps[name].append((linear[0].detach(), dy))
        return result + dy


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
