"""One batch's loss, differentiated once in a few places and ready for thousands of columns of its Hessian.

Two kinds of columns, of the Hessian of the batch's sum over the selected coordinates i:

    through weights     d2l / dw_i dw_j                                     one product a weight j
    through positions   d2l / dw_i dw_j = sum over s, q of  M_i(s, q, u) X[s, q, a],   M_i(s, q, u) = d2l_s / dw_i dy[s, q, u]

for a weight j = (u, a) of a linear layer y = X W^T. One product gives M_i(., q, u) for all sequences s at once, so that a row of
weights costs as many products as a sequence has positions instead of one a weight. The second form holds for coordinates i
that the layer's input does not depend on: those of layers called later, of its own, and of its siblings.

Several copies of the batch may run in one graph; then a pass gives a column each. Legend: K copies, S sequences of a copy,
T positions, r units, c inputs, n coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hesscope.arithmetic import linear_passes
from hesscope.engines.base import parameter_values
from hesscope.engines.forward_rules import Replacing
from hesscope.engines.linear_uses import Box, Perturbation, PerturbLinears
from hesscope.engines.reverse_over_reverse import (
    SavedBytes,
    missing_derivatives_in_words,
    require_second_derivative,
)
from hesscope.engines.second_derivatives import WRITTEN_OUT
from hesscope.losses import Loss
from hesscope.problem import Problem
from hesscope.space import Coordinates, Space


class BlockGraph:
    """The gradient's graph of one batch, with leaves beside the selected linear layers.

    Args:
        boxes: of the weights that only linear layers use; other parameters are differentiated whole.
        through_positions: names of weights whose outputs are differentiated too.
        copies: of the batch; more than one only where every selected parameter has a box.
        sequences: in the batch; 1 where it is not to be taken apart.
    """

    def __init__(
        self,
        problem: Problem,
        b: int,
        space: Space,
        boxes: dict[str, Box],
        through_positions: frozenset[str] = frozenset(),
        copies: int = 1,
        sequences: int = 1,
        loss: Loss | None = None,
    ) -> None:
        self._place_leaves(problem, space, boxes, through_positions, copies, sequences)
        meter = SavedBytes(problem.model.parameters())
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
            with Replacing(WRITTEN_OUT), PerturbLinears(self._linear, self._values):
                total, _ = problem.total(b, self._values, loss=loss, copies=copies)
            self._gradients = self._differentiate(total)
        require_second_derivative(list(self._gradients.values()))
        self.bytes = meter.bytes

    def _place_leaves(
        self, problem: Problem, space: Space, boxes: dict[str, Box], through_positions: frozenset[str], copies: int, sequences: int
    ) -> None:  # fmt: skip
        self._space, self._copies, self._sequences = space, copies, sequences
        self._values = parameter_values(problem, space)
        self._linear = {
            name: Perturbation(box, copies * self._sequences, self._values[name], name in through_positions)
            for name, box in boxes.items()
        }
        self._whole = {name: p.requires_grad_() for name, p in self._values.items() if name not in boxes}

    def _differentiate(self, y: Tensor, along: Tensor | None = None) -> dict[str, Tensor | None]:
        """First derivatives of y, or of <y, along>, by leaf; None where y does not depend on it."""
        leaves = {f"dW/{name}": p.dW for name, p in self._linear.items()} | dict(self._whole)
        leaves |= {f"dy/{name}": p.dy for name, p in self._linear.items() if p.dy is not None}
        if not y.requires_grad:
            return dict.fromkeys(leaves)
        found = torch.autograd.grad(y, list(leaves.values()), along, create_graph=True, allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    @property
    def unused(self) -> list[str]:
        """Selected parameters on which this batch's loss does not depend."""
        found = {name: self._gradients[f"dW/{name}"] for name in self._linear}
        found |= {name: self._gradients[name] for name in self._whole}
        return [name for name, g in found.items() if g is None]

    def inputs(self, name: str) -> Tensor | None:
        """What the layer of a weight through positions received, the selected inputs only: [S, T, c]."""
        x_GTc = self._linear[name].inputs
        return None if x_GTc is None else x_GTc[: self._sequences]

    def columns(self, c: Coordinates, which: Tensor) -> Tensor:
        """Columns of the selected coordinates `which` (at most `copies`) of one parameter, as rows [k, n]."""
        k = len(which)
        if c.name in self._whole:
            gradient = self._gradients[c.name]
            seed = None if gradient is None else _zeros(gradient)
            if seed is not None:
                seed.view(-1)[c.flat_indices()[which].to(seed.device)] = 1.0
            return self._pull(gradient, seed).sum(1)[:k]
        gradient = self._gradients[f"dW/{c.name}"]
        if gradient is None:
            return self._pull(None, None).sum(1)[:k]
        seed_KSb = _zeros(gradient).view(self._copies, self._sequences, -1)
        copy = torch.arange(k, device=seed_KSb.device)
        seed_KSb[copy, :, self._linear[c.name].box.place[which.to(copy.device)]] = 1.0
        return self._pull(gradient, seed_KSb.view_as(gradient)).sum(1)[:k]

    def product(self, name: str, v_b: Tensor) -> Tensor:
        """The Hessian times one vector over the box [r, c] of a weight, [n]: what columns of it add up to."""
        gradient = self._gradients[f"dW/{name}"]
        seed = None if gradient is None else _zeros(gradient)
        if seed is not None:
            seed[: self._sequences] = v_b.to(seed)
        return self._pull(gradient, seed)[0].sum(0)

    def responses(self, name: str, unit: int, positions: Tensor) -> Tensor:
        """M(s, q, u) over all coordinates for positions q (at most `copies`) of one unit u of the box: [k, S, n]."""
        gradient = self._gradients[f"dy/{name}"]
        if gradient is None:
            return self._pull(None, None)[: len(positions)]
        seed_KSTr = _zeros(gradient).view(self._copies, self._sequences, *gradient.shape[1:])
        copy = torch.arange(len(positions), device=gradient.device)
        seed_KSTr[copy, :, positions.to(copy.device), unit] = 1.0
        return self._pull(gradient, seed_KSTr.view_as(gradient))[: len(positions)]

    def _pull(self, gradient: Tensor | None, seed: Tensor | None) -> Tensor:
        """The derivative of <gradient, seed> in every selected coordinate, copies and sequences apart: [K, S, n]."""
        if gradient is None or not gradient.requires_grad:
            return self._gathered({})
        with missing_derivatives_in_words(), linear_passes():
            found = torch.autograd.grad(
                gradient, list(self._weight_leaves.values()), seed, retain_graph=True, allow_unused=True
            )
        return self._gathered(dict(zip(self._weight_leaves, found, strict=True)))

    @property
    def _weight_leaves(self) -> dict[str, Tensor]:
        return {name: p.dW for name, p in self._linear.items()} | self._whole

    def _gathered(self, parts: Mapping[str, Tensor | None]) -> Tensor:
        """Derivatives by parameter as those of the selected coordinates, [K, S, n]; what is missing is zero."""
        shape = (self._copies, self._sequences)
        result = torch.zeros(*shape, self._space.size, dtype=self._space.dtype, device=self._space.device)
        for c in self._space.coordinates:
            part, own = parts.get(c.name), self._space.slices[c.name]
            if part is not None and c.name in self._whole:
                result[0, 0, own] = c.gather(part).reshape(-1)
            elif part is not None:
                box = self._linear[c.name].box
                result[..., own] = part.reshape(*shape, -1).index_select(-1, box.place)
        return result


def _zeros(like: Tensor) -> Tensor:
    """Zeros in memory order, whatever the strides of a gradient."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
