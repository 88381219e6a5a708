"""The Hessian of a problem's objective."""

from __future__ import annotations

import math
from typing import Any

from hesscope.engines import Auto, Engine, make_engine
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.errors import HesscopeError
from hesscope.models import named_parameters, state_key
from hesscope.operators.base import Operator
from hesscope.operators.batch_columns import BatchColumns
from hesscope.operators.composed import RankOne
from hesscope.operators.graphs import KeptLinearizations
from hesscope.operators.matrix_run import MatrixRun, UnitVectors, matrix_run
from hesscope.problem import Problem, select
from hesscope.problem.microbatches import microbatched
from hesscope.space import Space, Vectors, vectors


class HessianOfRisk(Operator):
    """H = (1/N) sum over batches of the Hessian of the batch's summed loss: the data loop and its one division.

    With `microbatch` the loop goes over smaller batches of the same sequences.
    """

    def __init__(
        self, problem: Problem, space: Space, engine: Engine, graph_memory: int | None, microbatch: int | None = None
    ) -> None:
        super().__init__(space)
        self.problem = problem
        self.engine = engine
        self._microbatch = microbatch
        self._parts = problem if microbatch is None else microbatched(problem, microbatch)
        self._graphs = KeptLinearizations(self._parts, space, engine, graph_memory)
        self._units = 0.0
        self._columns: list[BatchColumns] = []

    def _matmat(self, V: Vectors) -> Vectors:
        self._units += self.engine.prepare(self._parts, self.space)
        if isinstance(self.engine, Auto) and self.engine.due(self._parts, self.products - vectors.count(V)):
            self._measure(self.engine, V)
        result = self.space.zeros(vectors.count(V))
        for b in range(len(self._parts.batches)):
            linearization, built, kept = self._graphs.get(b)
            before = 0 if built else linearization.passes
            linearization.add_product(V, into=result, last=not kept)
            self._spend(b, built, linearization.passes - before, vectors.count(V))
            del linearization  # one that is not kept goes before the next is built
        vectors.scale_(result, 1.0 / self._parts.N)
        return result

    def _measure(self, engine: Auto, V: Vectors) -> None:
        """Let engine="auto" choose; what another engine has made is of no use to the one that takes over."""
        first, built, kept = self._graphs.get(0)
        self._spend(0, built, 0, 0)
        before = engine.chosen
        self._units += self._parts.counts[0] / self._parts.N * engine.measure(self._parts, self.space, V, first, kept)
        if engine.chosen != before:
            self._graphs.drop()

    def risk_and_gradient(self) -> tuple[float, Vectors]:
        """R and its gradient over the selection, from the same graphs."""
        total, gradient = 0.0, self.space.zeros()
        for b in range(len(self._parts.batches)):
            linearization, built, _ = self._graphs.get(b)
            total += linearization.total
            vectors.add_(gradient, linearization.gradient())
            self._spend(b, built, 0, 0)
            self._units += self._parts.counts[b] / self._parts.N * self.engine.gradient_units
            del linearization
        return total / self._parts.N, vectors.scale(gradient, 1.0 / self._parts.N)

    def matrix_run(self, route: str) -> MatrixRun:
        """Batch by batch, on a graph of its own; another engine than reverse-over-reverse is taken at its word."""
        if not isinstance(self.engine, (Auto, ReverseOverReverse)):
            return UnitVectors(self)
        self.release()
        self._columns.append(BatchColumns(self._parts, self.space, route))
        return self._columns[-1]

    def release(self) -> None:
        """Drop the kept graphs; the next product builds them again."""
        self._graphs.drop()

    def _spend(self, b: int, built: bool, passes: int, products: int) -> None:
        self._units += self._parts.counts[b] / self._parts.N * self.engine.units(built, passes, products)

    @property
    def units(self) -> float:
        return self._units + sum(run.units for run in self._columns)

    def describe(self) -> dict[str, Any]:
        return {
            "operator": "hessian",
            "engine": self.engine.name,
            "engine_choice": self.engine.note or f"{self.engine.name}, as asked",
            "microbatch": self._microbatch,
            "graphs_kept": self._graphs.batches,
            "graph_bytes": self._graphs.bytes,
            "engine_error": self._graphs.error,
        }

    def origin(self) -> dict[str, Any] | None:
        return self.problem.describe()


class HessianOfPerplexity(Operator):
    """P (H + g g^T) with P = exp(R): a rank-one update of the risk's Hessian, renewed when the parameters change."""

    def __init__(self, of_risk: HessianOfRisk) -> None:
        super().__init__(of_risk.space)
        self._of_risk = of_risk
        self._current: tuple[object, float, Operator] | None = None

    def _updated(self) -> tuple[float, Operator]:
        """P and the operator for the parameters as they are now."""
        key = state_key(self._of_risk.problem.model)
        if self._current is None or self._current[0] != key:
            risk, gradient = self._of_risk.risk_and_gradient()
            perplexity = math.exp(risk)
            self._current = key, perplexity, perplexity * (self._of_risk + RankOne(self.space, gradient))
        return self._current[1:]

    def _matmat(self, V: Vectors) -> Vectors:
        return self._updated()[1].matmat(V)

    def matrix_run(self, route: str) -> MatrixRun:
        return matrix_run(self._updated()[1], route)

    def release(self) -> None:
        """Drop the kept graphs; the next product builds them again."""
        self._of_risk.release()

    @property
    def units(self) -> float:
        return self._of_risk.units

    def describe(self) -> dict[str, Any]:
        perplexity, updated = self._updated()
        return self._of_risk.describe() | {"perplexity": perplexity, "composed": updated.describe()}

    def origin(self) -> dict[str, Any] | None:
        return self._of_risk.origin()


def _require_own_space(problem: object, space: object) -> Space:
    """Raise HesscopeError for what is no problem, no space, or another model's space."""
    if not isinstance(problem, Problem):
        raise HesscopeError(
            f"Expected a problem, from hs.causal_lm, hs.supervised or hs.Problem, got {type(problem).__name__}."
        )
    if not isinstance(space, Space):
        raise HesscopeError(f"Expected a space, from hs.select(problem, ...), got {type(space).__name__}.")
    shapes = {name: tuple(p.shape) for name, p in named_parameters(problem.model).items()}
    for c in space.coordinates:
        if shapes.get(c.name) != c.parameter_shape:
            raise HesscopeError(
                f"Expected a selection from this problem's own model, but it has no {c.name!r} of shape "
                f"{list(c.parameter_shape)}; call hs.select with this problem."
            )
    return space


def hessian(
    problem: Problem,
    space: Space | None = None,
    engine: str = "auto",
    graph_memory: int | None = None,
    microbatch: int | None = None,
) -> Operator:
    """The Hessian of the problem's objective over a space.

    For objective="nll", H = d^2 R / d theta^2. For objective="perplexity", with P = exp(R) and g = d R / d theta, it is
    P (H + g g^T), the same operator with a rank-one update.

    The operator follows the parameters: after an optimizer's step its products are those of the new weights. Only a
    change through `parameter.data` goes unseen; call `release()` after one.

    Args:
        problem: what is differentiated.
        space: from `hesscope.select`; every trainable parameter by default.
        engine: "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward" (all exact), "finite-difference", or
            "auto": the first of them, unless a measurement in the course of a long run shows another to be clearly faster.
            `describe()["engine_choice"]` says what was chosen and why.
        graph_memory: bytes that graphs kept between products may take; half of the free memory by default, 0 keeps none.
        microbatch: run so many sequences at once at most, whatever the batches; less memory, the same answer.

    Raises:
        HesscopeError: an unknown engine, a loss that is not finite, or batches that cannot be split.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> hs.hessian(hs.supervised(model, [batch], loss="mse")) @ torch.ones(2)      # (2/N) X^T X v
        tensor([1., 4.])
    """
    if space is None and isinstance(problem, Problem):
        space = select(problem)
    space = _require_own_space(problem, space)
    base = HessianOfRisk(problem, space, make_engine(engine), graph_memory, microbatch)
    return base if problem.objective == "nll" else HessianOfPerplexity(base)
