"""Forward-over-reverse and reverse-over-forward: one of the two derivatives is taken in forward mode.

With f the batch's summed loss and g its gradient,

    forward-over-reverse:  H v = d/ds g(theta + s v) at s = 0            (the forward derivative of the gradient)
    reverse-over-forward:  H v = gradient of  d/ds f(theta + s v)        (the gradient of the forward derivative)

Nothing is kept between products, so that memory stays near that of one training step. All vectors of a call go through one
pass over theta: only their tangents are batched. Pearlmutter (1994), Fast exact multiplication by the Hessian.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from hesscope.engines.base import Engine, Linearization, gradient_parts, parameter_values
from hesscope.engines.checking import disagreement, short_slice, tolerated
from hesscope.engines.forward_context import NotInForwardMode, quietly, refusals_in_words
from hesscope.engines.forward_rules import FORWARD_OVER_REVERSE, REVERSE_OVER_FORWARD, Replacements, Replacing
from hesscope.engines.reverse_over_reverse import ReverseOverReverse, SavedBytes
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.memory import least_available
from hesscope.problem import Problem
from hesscope.space import Space, Vectors, vectors

Values = dict[str, Tensor]
Scalar = Callable[[Values], Tensor]


class ForwardMode(Engine):
    """What both arrangements share. Before its first product an engine is held to reverse-over-reverse on a short sequence.

    A model that forward mode cannot run (custom autograd functions), or gets wrong, is left to reverse-over-reverse, with a
    HesscopeWarning and a note.
    """

    build_units = 3.0
    replacements: Replacements

    def __init__(self) -> None:
        self._instead: Engine | None = None
        self._checked = False

    @staticmethod
    @abstractmethod
    def product(f: Scalar, theta: Values, v: Values) -> Values:
        """The Hessian of f at theta times v."""

    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        if self._instead is not None:
            return self._instead.linearize(problem, b, space)
        return _Passes(problem, b, space, self)

    def prepare(self, problem: Problem, space: Space) -> float:
        if self._checked:
            return 0.0
        self._checked = True
        small = short_slice(problem)
        share = small.counts[0] / problem.N
        # Two vectors, for a batch of tangents takes other rules than a single one.
        v, ours, theirs = space.rademacher(0, ["engine/0", "engine/1"]), space.zeros(2), space.zeros(2)
        passes = self.linearize(small, 0, space)
        try:
            passes.add_product(v, ours)
        except NotInForwardMode as error:
            self._fall_back(str(error))
            return share * self.units(1, passes.passes, 0)
        spent = self.units(1, passes.passes, 2)
        reference = ReverseOverReverse()
        try:
            reference.linearize(small, 0, space).add_product(v, theirs, last=True)
        except HesscopeError:
            self._remark("not held to reverse-over-reverse, which does not run here")
            return share * spent
        gap = disagreement(space, ours, theirs)
        if gap > tolerated(space):
            self._fall_back(f"it differs from reverse-over-reverse by {gap:.1e} on a short sequence")
        else:
            self._remark(f"agrees with reverse-over-reverse to {gap:.1e} on a short sequence")
        return share * (spent + reference.units(1, 0, 2))

    def _remark(self, text: str) -> None:
        self.note = f"{self.note}; {text}" if self.note else f"{self.name}, as asked: {text}"

    def _fall_back(self, reason: str) -> None:
        other = ReverseOverReverse()
        self.note = f"{other.name} in place of {self.name}: {reason}"
        warnings.warn(f"Products come from {self.note}.", HesscopeWarning, stacklevel=2)
        self._instead = other
        self.build_units, self.pass_units, self.product_units = other.build_units, 0.0, other.product_units


class ForwardOverReverse(ForwardMode):
    """Exact; a pass costs 3 and every vector 6."""

    name = "forward-over-reverse"
    pass_units = 3.0
    product_units = 6.0
    replacements = FORWARD_OVER_REVERSE

    @staticmethod
    def product(f: Scalar, theta: Values, v: Values) -> Values:
        result: Values = jvp(grad(f), (theta,), (v,))[1]
        return result


class ReverseOverForward(ForwardMode):
    """Exact; a pass costs 1 and every vector 8."""

    name = "reverse-over-forward"
    pass_units = 1.0
    product_units = 8.0
    replacements = REVERSE_OVER_FORWARD

    @staticmethod
    def product(f: Scalar, theta: Values, v: Values) -> Values:
        result: Values = grad(lambda at: jvp(f, (at,), (v,))[1])(theta)
        return result


class _Passes(Linearization):
    """One batch's loss, ready to be run with tangents."""

    gradient_units = 3.0

    def __init__(self, problem: Problem, b: int, space: Space, engine: ForwardMode) -> None:
        self._problem, self._b, self._space, self._engine = problem, b, space, engine
        self._theta = parameter_values(problem, space)
        self.bytes = 0
        meter = SavedBytes(problem.model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
            total, parts = gradient_parts(problem, b, self._theta)
        self.total = total
        self.unused = [name for name, part in parts.items() if part is None]
        self._constant = len(self.unused) == len(self._theta)
        self._at_once = _how_many(meter.bytes, least_available(problem.devices) // 2)

    def gradient(self) -> Vectors:
        result = self._space.zeros()
        _, parts = gradient_parts(self._problem, self._b, self._theta)
        for c in self._space.coordinates:
            part = parts[c.name]
            if part is not None:
                result[c.name][0] = c.gather(part)
        return result

    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        if self._constant:
            return
        start, count = 0, vectors.count(V)
        while start < count:
            stop = min(start + self._at_once, count)
            columns = self._columns(vectors.columns(V, start, stop))
            for c in self._space.coordinates:
                for k in range(stop - start):
                    into[c.name][start + k] += c.gather(columns[c.name][k]).to(c.device)
            start = stop

    def _columns(self, V: Vectors) -> Values:
        """H times vectors that fit into memory together; whole parameters, [K, *shape]."""
        tangents = {
            c.name: torch.stack([c.scatter(v) for v in V[c.name]]).to(self._theta[c.name])
            for c in self._space.coordinates
        }
        if vectors.count(V) > 1:
            try:
                self.passes += 1
                return self._run(vmap(self._product, randomness="same"), tangents)
            except NotInForwardMode as error:
                self._engine.note = (
                    f"{self._engine.name}, one vector at a time, for several at once do not run: {error}"
                )
                self._at_once = 1
        columns = []
        for k in range(vectors.count(V)):
            self.passes += 1
            columns.append(self._run(self._product, {name: part[k] for name, part in tangents.items()}))
        return {name: torch.stack([column[name] for column in columns]) for name in tangents}

    def _product(self, v: Values) -> Values:
        return self._engine.product(self._scalar, self._theta, v)

    def _scalar(self, theta: Values) -> Tensor:
        return self._problem.total(self._b, theta)[0].reshape(())

    def _run(self, function: Callable[[Values], Values], v: Values) -> Values:
        # Forward mode records the forward pass of the reverse one, so that gradients have to be on.
        with torch.enable_grad(), Replacing(self._engine.replacements), quietly(), refusals_in_words():
            return {name: part.detach() for name, part in function(v).items()}


def _how_many(activations: int, memory: int) -> int:
    """How many vectors fit into memory at once: the tangents of each take as much as the activations themselves."""
    return max(1, min(64, memory // max(activations, 1) - 1))
