"""Squares of gradients, sequence by sequence, without a gradient a sequence in memory.

A linear layer's weight has, for sequence s, the gradient g_s = dY_s^T X_s with dY the derivatives in the layer's outputs and
X its inputs, so that sum_s g_s^2 needs X and dY alone. Legend: S sequences, T positions, r output units, c inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscope.engines.base import parameter_values
from hesscope.engines.linear_uses import Box, Perturbation, PerturbLinears
from hesscope.engines.reverse_over_reverse import SavedBytes
from hesscope.problem import Problem
from hesscope.space import Space, Vectors

#: Gradients of single sequences that are formed at once.
_CHUNK_BYTES = 64 * 2**20


class SquaredGradients:
    """One batch's outputs z with their graph, for cotangents u of z: the squares of J^T u.

    Weights with a box are taken apart into `sequences`; of other parameters the batch's whole gradient is squared.
    """

    def __init__(self, problem: Problem, b: int, space: Space, boxes: dict[str, Box], sequences: int) -> None:
        self._space, self._sequences = space, sequences
        values = parameter_values(problem, space)
        self._linear = {name: Perturbation(box, 1, values[name], outputs=True) for name, box in boxes.items()}
        self._whole = {name: p.requires_grad_() for name, p in values.items() if name not in boxes}
        meter = SavedBytes(problem.model.parameters())
        hooks = torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack)
        with torch.enable_grad(), hooks, PerturbLinears(self._linear, values):
            self._z = problem.outputs(b, values)
        for perturbation in self._linear.values():
            if perturbation.inputs is not None:
                meter.pack(perturbation.inputs)
        self.bytes = meter.bytes + self._z.nbytes

    @property
    def outputs(self) -> Tensor:
        """z, without its graph."""
        return self._z.detach()

    def add(self, u: Tensor, into: Vectors, weight: float) -> None:
        """Add weight * sum_s (J_s^T u_s)^2 to the one vector `into`."""
        leaves = {name: p.dy for name, p in self._linear.items() if p.dy is not None} | self._whole
        if not self._z.requires_grad or not leaves:
            return
        found = torch.autograd.grad(
            self._z, list(leaves.values()), u.to(self._z.dtype), retain_graph=True, allow_unused=True
        )
        gradients = dict(zip(leaves, found, strict=True))
        for c in self._space.coordinates:
            gradient = gradients.get(c.name)
            if gradient is None:
                continue
            if c.name in self._linear:
                perturbation = self._linear[c.name]
                squares = self._squares(gradient, perturbation).reshape(-1)[perturbation.box.place].reshape(c.shape)
            else:
                squares = c.gather(gradient).square()
            into[c.name][0].add_(squares.to(into[c.name]), alpha=weight)

    def _squares(self, dY: Tensor, perturbation: Perturbation) -> Tensor:
        """sum_s (dY_s^T X_s)^2 over the box, [r, c]."""
        assert perturbation.inputs is not None
        r, c = perturbation.box.shape
        X_STc, dY_STr = (x.reshape(self._sequences, -1, x.shape[-1]) for x in (perturbation.inputs, dY))
        total = dY.new_zeros(r, c)
        chunk = max(1, _CHUNK_BYTES // (r * c * dY.element_size()))
        for s in range(0, self._sequences, chunk):
            total += (dY_STr[s : s + chunk].mT @ X_STc[s : s + chunk]).square().sum(0)
        return total
