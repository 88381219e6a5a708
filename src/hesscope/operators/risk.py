"""A problem's curvature as an operator: the data loop and its one division; the perplexity's by a rank-one update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hesscope.engines import Auto, Engine, make_output_engine
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.engines.streaming import Streamed
from hesscope.engines.through_outputs import ThroughOutputs
from hesscope.errors import HesscopeError
from hesscope.models import named_parameters, state_key
from hesscope.operators.base import Operator
from hesscope.operators.batch_columns import BatchColumns
from hesscope.operators.composed import RankOne
from hesscope.operators.graphs import GraphMemory, KeptLinearizations, graph_memory_of
from hesscope.operators.matrix_run import MatrixRun, UnitVectors, matrix_run
from hesscope.operators.output_hessian import output_hessian
from hesscope.operators.probed_diagonal import ProbedDiagonal
from hesscope.operators.sampled import sample
from hesscope.operators.sampled_diagonal import SampledDiagonal, has_sampled_diagonal
from hesscope.problem import Problem, select
from hesscope.problem.microbatches import microbatched
from hesscope.space import Space, Vectors, vectors


class CurvatureOfRisk(Operator):
    """(1/N) sum over batches of what the engine gives for a batch's summed loss: its Hessian, GGN or Fisher matrix.

    `kind` is the operator's name and settings, for the record of a result. With `microbatch` the loop goes over smaller
    batches of the same sequences. With `memory` its kept graphs share the room of another operator's.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        engine: Engine,
        graph_memory: int | None,
        kind: dict[str, Any],
        positive_semidefinite: bool = False,
        microbatch: int | None = None,
        memory: GraphMemory | None = None,
    ) -> None:
        super().__init__(space, positive_semidefinite)
        self._kind = kind
        self.problem = problem
        self.engine = engine
        self._microbatch = microbatch
        self._parts = problem if microbatch is None else microbatched(problem, microbatch)
        self._memory = graph_memory_of(self._parts, graph_memory) if memory is None else memory
        self._graphs = KeptLinearizations(self._parts, space, engine, self._memory)
        self._graph_memory = graph_memory
        self._units = 0.0
        self._columns: list[BatchColumns] = []
        self._sampled: SampledDiagonal | None = None
        self._probed: ProbedDiagonal | None = None
        self._gauss_newton: CurvatureOfRisk | None = None

    def _matmat(self, V: Vectors) -> Vectors:
        if isinstance(self.engine, Auto) and self.engine.due(self._parts, self.products - vectors.count(V)):
            self._measure(self.engine, V)
        return self.product_over(range(len(self._parts.batches)), V)

    def product_over(self, batches: Sequence[int], V: Vectors) -> Vectors:
        """What these batches contribute to the product: (1/N) times their sum."""
        self._units += self.engine.prepare(self._parts, self.space)
        if self._probed is not None:
            self._probed.drop()
        result = self.space.zeros(vectors.count(V))
        for b in batches:
            linearization, built, kept = self._graphs.get(b)
            before = 0 if built else linearization.passes
            linearization.add_product(V, into=result, last=not kept)
            self._graphs.note_unused(b, linearization)
            self._spend(b, self.engine.units(built, linearization.passes - before, vectors.count(V)))
            del linearization  # one that is not kept goes before the next is built
        vectors.scale_(result, 1.0 / self._parts.N)
        return result

    def _measure(self, engine: Auto, V: Vectors) -> None:
        """Let engine="auto" choose; what another engine has made is of no use to the one that takes over."""
        first, built, kept = self._graphs.get(0)
        self._spend(0, engine.units(built, 0, 0))
        before = engine.chosen
        self._spend(0, engine.measure(self._parts, self.space, V, first, kept))
        if engine.chosen != before:
            self._graphs.drop()

    def sampled(self, batches: int, seed: int, draw: int) -> Operator:
        return sample(self, len(self._parts.batches), batches, seed, draw)

    def narrowed(self, part: Space) -> CurvatureOfRisk:
        self.release()  # graphs kept for the whole make room for those of the part
        return CurvatureOfRisk(
            self.problem, part, self.engine.for_part(), self._graph_memory, self._kind, self.positive_semidefinite, self._microbatch
        )  # fmt: skip

    def risk_and_gradient(self) -> tuple[float, Vectors]:
        """R and its gradient over the selection, from the same graphs."""
        total, gradient = 0.0, self.space.zeros()
        for b in range(len(self._parts.batches)):
            linearization, built, _ = self._graphs.get(b)
            total += linearization.total
            spent = self.engine.units(built, 0, 0) + linearization.gradient_units
            vectors.add_(gradient, linearization.gradient())
            self._graphs.note_unused(b, linearization)
            self._spend(b, spent)
            del linearization
        return total / self._parts.N, vectors.scale(gradient, 1.0 / self._parts.N)

    def matrix_run(self, route: str) -> MatrixRun:
        """Batch by batch, on a graph of its own; an engine asked for by another name is taken at its word."""
        if not isinstance(self.engine, (Auto, ReverseOverReverse, ThroughOutputs)):
            return UnitVectors(self)
        middle = self.engine.middle if isinstance(self.engine, ThroughOutputs) else None
        # Graphs kept for products, those of a probe before the run included, make room for the block's own.
        self._columns.append(BatchColumns(self._parts, self.space, route, self.release, middle))
        return self._columns[-1]

    @property
    def draws_diagonal(self) -> bool:
        return self._kind["operator"] == "ggn" and has_sampled_diagonal(self.problem)

    def draw_diagonal(self, seed: int, number: int) -> Vectors:
        if not self.draws_diagonal:
            return super().draw_diagonal(seed, number)
        if self._sampled is None:
            self._sampled = SampledDiagonal(self._parts, self.space, self._memory)
        self.products += 1
        return self._sampled.draw(seed, number)

    @property
    def probed_groups(self) -> int:
        return self._probes().groups if self._has_probes else 0

    def probe_diagonal(self, seed: int, number: int) -> Vectors:
        if not self.probed_groups:
            return super().probe_diagonal(seed, number)
        self.products += 1
        if self._gauss_newton is not None:
            self._gauss_newton.release()
        return self._probes().draw(seed, number)

    @property
    def has_gauss_newton(self) -> bool:
        return self._kind["operator"] == "hessian" and has_sampled_diagonal(self.problem)

    def gauss_newton_product(self, V: Vectors) -> Vectors:
        if not self.has_gauss_newton:
            return super().gauss_newton_product(V)
        self.products += vectors.count(V)
        return self._beside().matmat(V)

    def draw_gauss_newton(self, seed: int, number: int) -> Vectors:
        if not self.has_gauss_newton:
            return super().draw_gauss_newton(seed, number)
        self.products += 1
        return self._beside().draw_diagonal(seed, number)

    def _beside(self) -> CurvatureOfRisk:
        """The Gauss-Newton matrix over the same space; graphs of both share the room, those of the Hessian first."""
        if self._probed is not None:
            self._probed.drop()
        if self._gauss_newton is None:
            engine = make_output_engine(Streamed.name if isinstance(self.engine, Streamed) else "auto", output_hessian)
            self._gauss_newton = CurvatureOfRisk(
                self.problem, self.space, engine, self._graph_memory, {"operator": "ggn"}, True, self._microbatch, self._memory
            )  # fmt: skip
        return self._gauss_newton

    @property
    def _has_probes(self) -> bool:
        """Whether this is a Hessian by exact products; an engine asked for by another name is taken at its word."""
        return self._kind["operator"] == "hessian" and isinstance(self.engine, (Auto, ReverseOverReverse))

    def _probes(self) -> ProbedDiagonal:
        if self._probed is None:
            # Graphs kept for products make room for those of the probes, and the other way round.
            self._probed = ProbedDiagonal(self._parts, self.space, self._graph_memory, self._graphs.drop)
        return self._probed

    def release(self) -> None:
        """Drop the kept graphs; the next product builds them again."""
        self._graphs.drop()
        for draws in (self._probed, self._sampled):
            if draws is not None:
                draws.drop()
        if self._gauss_newton is not None:
            self._gauss_newton.release()

    def _spend(self, b: int, units: float) -> None:
        self._units += units * self._parts.counts[b] / self._parts.N

    @property
    def units(self) -> float:
        draws = sum(made.units for made in (self._sampled, self._probed, self._gauss_newton) if made is not None)
        return self._units + draws + sum(run.units for run in self._columns)

    def describe(self) -> dict[str, Any]:
        return {
            **self._kind,
            "engine": self.engine.name,
            "engine_choice": self.engine.note or f"{self.engine.name}, as asked",
            "microbatch": self._microbatch,
            "graphs_kept": self._graphs.batches,
            "graph_bytes": self._graphs.bytes,
            "engine_error": self._graphs.error,
        }

    def origin(self) -> dict[str, Any] | None:
        return self.problem.describe()


class CurvatureOfPerplexity(Operator):
    """P (A + g g^T) with P = exp(R): a rank-one update of the risk's Hessian or GGN, renewed when the parameters change."""

    def __init__(self, of_risk: CurvatureOfRisk) -> None:
        super().__init__(of_risk.space, of_risk.positive_semidefinite)
        self._of_risk = of_risk
        self._current: tuple[object, float, Operator, Vectors] | None = None

    def _updated(self) -> tuple[float, Operator, Vectors]:
        """P, the operator and g for the parameters as they are now."""
        key = state_key(self._of_risk.problem.model)
        if self._current is None or self._current[0] != key:
            risk, gradient = self._of_risk.risk_and_gradient()
            perplexity = math.exp(risk)
            self._current = key, perplexity, perplexity * (self._of_risk + RankOne(self.space, gradient)), gradient
        return self._current[1:]

    def _matmat(self, V: Vectors) -> Vectors:
        return self._updated()[1].matmat(V)

    def narrowed(self, part: Space) -> CurvatureOfPerplexity:
        return CurvatureOfPerplexity(self._of_risk.narrowed(part))

    def matrix_run(self, route: str) -> MatrixRun:
        return matrix_run(self._updated()[1], route)

    @property
    def probed_groups(self) -> int:
        return self._of_risk.probed_groups

    def probe_diagonal(self, seed: int, number: int) -> Vectors:
        """P times a draw of A's diagonal, and P g^2, which is known."""
        if not self.probed_groups:
            return super().probe_diagonal(seed, number)
        self.products += 1
        perplexity, _, gradient = self._updated()
        draw = self._of_risk.probe_diagonal(seed, number)
        vectors.add_(draw, vectors.multiply(gradient, gradient))
        return vectors.scale(draw, perplexity)

    @property
    def has_gauss_newton(self) -> bool:
        return self._of_risk.has_gauss_newton

    def gauss_newton_product(self, V: Vectors) -> Vectors:
        """P (G + g g^T) V: what the perplexity's Hessian differs by from it is P (A - G)."""
        if not self.has_gauss_newton:
            return super().gauss_newton_product(V)
        self.products += vectors.count(V)
        perplexity, _, gradient = self._updated()
        product = self._of_risk.gauss_newton_product(V)
        vectors.add_(product, RankOne(self.space, gradient).matmat(V))
        return vectors.scale(product, perplexity)

    def draw_gauss_newton(self, seed: int, number: int) -> Vectors:
        """P times a draw of diag(G), and P g^2, which is known."""
        if not self.has_gauss_newton:
            return super().draw_gauss_newton(seed, number)
        self.products += 1
        perplexity, _, gradient = self._updated()
        draw = self._of_risk.draw_gauss_newton(seed, number)
        vectors.add_(draw, vectors.multiply(gradient, gradient))
        return vectors.scale(draw, perplexity)

    def release(self) -> None:
        """Drop the kept graphs; the next product builds them again."""
        self._of_risk.release()

    @property
    def units(self) -> float:
        return self._of_risk.units

    def describe(self) -> dict[str, Any]:
        perplexity, updated, _ = self._updated()
        return self._of_risk.describe() | {"perplexity": perplexity, "composed": updated.describe()}

    def origin(self) -> dict[str, Any] | None:
        return self._of_risk.origin()


def own_space(problem: object, space: object) -> Space:
    """The space, or that of every trainable parameter for None.

    Raises HesscopeError for what is no problem, no space, or another model's space.
    """
    if not isinstance(problem, Problem):
        raise HesscopeError(
            f"Expected a problem, from hs.causal_lm, hs.supervised or hs.Problem, got {type(problem).__name__}."
        )
    space = select(problem) if space is None else space
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


def with_objective(of_risk: CurvatureOfRisk) -> Operator:
    """The operator for the problem's objective: of R itself, or of exp(R)."""
    return of_risk if of_risk.problem.objective == "nll" else CurvatureOfPerplexity(of_risk)
