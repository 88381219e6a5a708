"""Columns of J^T M J, with J the derivative of a batch's outputs and M a matrix on them, as `block_graph` has the Hessian's.

J^T u is linear in u, so that J v is its derivative in u along v: both graphs are built once, at u = 0 (`through_outputs`). A
column through weights is J^T M (J e_j). Through positions it is  sum over s, q of  (J^T M J_y e_(s, q, u)) X[s, q, a]  with J_y the
derivative in the layer's output, for M takes no sequence to another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscope.arithmetic import linear_passes
from hesscope.engines.block_graph import BlockGraph
from hesscope.engines.linear_uses import Box, PerturbLinears
from hesscope.engines.output_tails import Middle
from hesscope.engines.reverse_over_reverse import SavedBytes, missing_derivatives_in_words, require_second_derivative
from hesscope.engines.through_outputs import INSTEAD, SavedWithoutZeros
from hesscope.problem import Problem
from hesscope.space import Space


class OutputBlockGraph(BlockGraph):
    """The graph of J^T u for one batch, with leaves beside the selected linear layers; arguments as those of `BlockGraph`."""

    def __init__(
        self, problem: Problem, b: int, space: Space, boxes: dict[str, Box], through_positions: frozenset[str], copies: int,
        sequences: int, middle: Middle,
    ) -> None:  # fmt: skip
        self._place_leaves(problem, space, boxes, through_positions, copies, sequences)
        saved = SavedWithoutZeros(SavedBytes(problem.model.parameters()))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            with PerturbLinears(self._linear, self._values):
                self._z = problem.outputs(b, self._values, copies=copies)
            saved.backward = True
            # One zero in memory, seen at every place.
            self._u = self._z.new_zeros(()).expand(self._z.shape).detach().requires_grad_()
            self._gradients = self._differentiate(self._z, self._u)
        require_second_derivative(list(self._gradients.values()), INSTEAD)
        with torch.no_grad():
            self._multiply = middle(problem, b, self._z.detach().chunk(copies)[0])
        self.bytes = saved.bytes + self._z.nbytes

    def _pull(self, gradient: Tensor | None, seed: Tensor | None) -> Tensor:
        """J^T M J of the seed, in every selected coordinate, copies and sequences apart: [K, S, n]."""
        if gradient is None or not gradient.requires_grad:
            return self._gathered({})
        leaves = self._weight_leaves
        with linear_passes():
            with missing_derivatives_in_words(INSTEAD):
                (Jv,) = torch.autograd.grad(gradient, [self._u], seed, retain_graph=True, materialize_grads=True)
            with torch.no_grad():
                middle = torch.cat([self._multiply(u) for u in Jv.chunk(self._copies)]).to(self._z.dtype)
            found = torch.autograd.grad(self._z, list(leaves.values()), middle, retain_graph=True, allow_unused=True)
        return self._gathered(dict(zip(leaves, found, strict=True)))
