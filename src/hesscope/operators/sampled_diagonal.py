"""The diagonal of a GGN from gradients at labels that are drawn from the model.

With u = d(-log p(y)) / dz at labels y ~ p, every token's u_t has mean zero and E[u_t u_t^T] = H_out, and different tokens'
are independent. So the gradient g_s of a sequence has E[g_s^2] = diag(sum over t of s of J_t^T H_out J_t), and

    (1/N) sum over sequences s of  g_s^2

is unbiased for diag(G), whatever the dimension, with a relative error of about sqrt(2 / sequences) for one draw. A draw costs a
backward pass (2 forward passes); the outputs' graph is built once (1).
"""

from __future__ import annotations

from hesscope.engines.squared_gradients import SquaredGradients
from hesscope.losses import CrossEntropyLoss, SamplingLoss, residual
from hesscope.models import state_key
from hesscope.operators.batch_plan import sequences_are_apart, taken_apart
from hesscope.operators.graphs import GraphMemory
from hesscope.problem import Problem
from hesscope.space import Space, Vectors
from hesscope.space.random import stream_key

_BUILD_UNITS, _DRAW_UNITS = 1.0, 2.0


class SampledDiagonal:
    """Draws of the diagonal, each with labels of its own."""

    def __init__(self, problem: Problem, space: Space, memory: GraphMemory) -> None:
        self._problem, self._space, self._memory = problem, space, memory
        self.units = 0.0
        plans = taken_apart(problem, space)
        boxes = {name: box for fits, S in plans if S > 1 for name, box in fits.items()}
        apart = sequences_are_apart(problem, space, boxes)
        self._apart = plans if apart else [(fits, 1) for fits, _ in plans]
        self._kept: SquaredGradients | None = None
        self._state: object = None

    def draw(self, seed: int, number: int) -> Vectors:
        """Draw number `number` of a seed, as one vector: the diagonal of that sample's Fisher matrix per sequence."""
        problem, total = self._problem, self._space.zeros()
        key = stream_key(seed, f"fisher/{number}")
        with problem.comm.summed(total) as own:
            before = self.units
            for b in problem.mine:
                graph = self._graph(b)
                assert isinstance(problem.loss, SamplingLoss)
                labelled = problem.loss.sample(graph.outputs, problem.on_device(b), key, sum(problem.counts[:b]))
                u = residual(problem.require_split_loss(), graph.outputs, labelled)
                graph.add(u, total, 1.0 / problem.N)
                self.units += _DRAW_UNITS * problem.counts[b] / problem.N
                del graph  # one that is not kept goes before the next is built
            own.amount = self.units - before
        self.units = before + own.amount
        return total

    def drop(self) -> None:
        """Let go of the kept graph."""
        if self._kept is not None:
            self._memory.used -= self._kept.bytes
            self._kept = None

    def _graph(self, b: int) -> SquaredGradients:
        """Batch b's graph; the only batch's is kept where there is room, several batches' are built anew for every draw."""
        state = state_key(self._problem.model)
        if state != self._state:
            self.drop()
            self._state = state
        if self._kept is not None:
            return self._kept
        made = SquaredGradients(self._problem, b, self._space, *self._apart[b])
        self.units += _BUILD_UNITS * self._problem.counts[b] / self._problem.N
        if len(self._problem.batches) == 1 and self._memory.take(made.bytes):
            self._kept = made
        return made


def has_sampled_diagonal(problem: Problem) -> bool:
    """Whether E[u u^T] is the loss's second derivative in the outputs: a language model's, a classifier's, a regressor's."""
    loss = problem.loss
    if isinstance(loss, CrossEntropyLoss) and any(batch[1].is_floating_point() for batch in problem.batches):
        return False  # class probabilities weigh an example by their sum
    return isinstance(loss, SamplingLoss) and bool(getattr(loss, "canonical", False))
