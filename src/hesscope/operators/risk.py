"""A problem's curvature as an operator: the data loop and its one division."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hesscope.arithmetic import in_words, multiplying, tolerance
from hesscope.communicator import Communicator, Own
from hesscope.engines import Auto, Engine, make_output_engine
from hesscope.engines.output_tails import rebound
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.engines.streaming import Streamed, StreamedThroughOutputs
from hesscope.engines.through_outputs import ThroughOutputs
from hesscope.losses import takes_kernel
from hesscope.models import state_key
from hesscope.operators.asked import sum_dtype
from hesscope.operators.base import Operator
from hesscope.operators.batch_columns import BatchColumns
from hesscope.operators.graphs import GraphMemory, KeptLinearizations, graph_memory_of
from hesscope.operators.matrix_run import EitherWay, MatrixRun, UnitVectors
from hesscope.operators.output_hessian import OutputHessian
from hesscope.operators.probed_diagonal import ProbedDiagonal
from hesscope.operators.product_error import ProductError, are_stated, measure_product_error
from hesscope.operators.room import make_room
from hesscope.operators.sampled import sample
from hesscope.operators.sampled_diagonal import SampledDiagonal, has_sampled_diagonal
from hesscope.problem import Problem
from hesscope.problem.microbatches import microbatched
from hesscope.space import Division, Space, Vectors, vectors


class CurvatureOfRisk(Operator):
    """(1/N) sum over batches of what the engine gives for a batch's summed loss: its Hessian, GGN or Fisher matrix.

    `kind` is the operator's name and settings, for the record of a result. With `microbatch` the loop goes over smaller
    batches of the same sequences. With `memory` its kept graphs share the room of another operator's. `precision` is one of
    `hesscope.arithmetic`.
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
        precision: str | None = None,
    ) -> None:
        super().__init__(space, positive_semidefinite)
        self._kind, self.precision = kind, precision
        if precision in ("tf32", "bfloat16") and isinstance(engine, Auto):
            engine.note = f"{engine.chosen}: others are not measured with precision {precision!r}"
        self.problem = problem
        self.engine = engine
        self._asked = engine.name if engine.asked else Auto.name
        self._microbatch = microbatch
        self._parts = problem if microbatch is None else microbatched(problem, microbatch)
        if microbatch is not None and isinstance(engine, (ThroughOutputs, StreamedThroughOutputs)):
            engine.middle = rebound(engine.middle, self._parts)
        self._memory = graph_memory_of(self._parts, graph_memory) if memory is None else memory
        #: What engines know: vectors that are not divided among processes.
        self._inner = space.whole
        self._graphs = KeptLinearizations(self._parts, self._inner, engine, self._memory)
        self._graph_memory = graph_memory
        self._units, self._error = 0.0, 0.0
        self._seen: set[int] = set()
        self._columns: list[BatchColumns] = []
        self._sampled: SampledDiagonal | None = None
        self._probed: ProbedDiagonal | None = None
        self._gauss_newton: CurvatureOfRisk | None = None
        self._has_room = False
        self._looked: tuple[Engine, bool] | None = None
        self._measured_error: tuple[object, ProductError] | None = None

    def _make_room(self) -> None:
        """Before anything heavy: see that it fits, or take what does."""
        if self._has_room:
            return
        self._has_room = True
        middle = self.engine.middle if isinstance(self.engine, ThroughOutputs) else None
        streamed = Streamed if middle is None else partial(StreamedThroughOutputs, middle)
        before = self.engine
        self.engine, left = make_room(self.engine, streamed, self._parts, self._inner)
        if left is not None and self._graph_memory is None and len(self._parts.batches) > 1:
            self._memory.limit = min(self._memory.limit, left)
        if self.engine is not before:
            self._graphs = KeptLinearizations(self._parts, self._inner, self.engine, self._memory)

    def _matmat(self, V: Vectors) -> Vectors:
        exact = self.precision in (None, "float32")
        if exact and isinstance(self.engine, Auto) and self.engine.due(self._parts, self.products - vectors.count(V)):
            self._measure(self.engine, self.space.gathered(V))
        return self.product_over(range(len(self._parts.batches)), V)

    def _prepare(self) -> None:
        """Let the engine look at the problem before its first product; an exception there is all ranks'."""
        looking = (self.engine, isinstance(self.engine, Auto) and self.engine.settled)
        if looking == self._looked:
            return
        with self.problem.comm.summed(), multiplying("float32"):
            self._units += self.engine.prepare(self._parts, self._inner)
        self._looked = looking

    def product_over(self, batches: Sequence[int], V: Vectors) -> Vectors:
        """What these batches contribute to the product: (1/N) times their sum."""
        self._make_room()
        self._prepare()
        if self._probed is not None:
            self._probed.drop()
        if self.space.divided is None:
            result = self._sum_over(batches, V)
        elif isinstance(self.engine, StreamedThroughOutputs) or self._is_streamed:
            result = self._divided_sum_over(batches, V, self.space.divided)
        else:
            result = self.space.own(self._sum_over(batches, self.space.gathered(V)))
        self._seen |= set(batches)
        if len(self._seen) == len(self._parts.batches):
            self._graphs.every_batch_seen()
        vectors.scale_(result, 1.0 / self._parts.N)
        return vectors.in_dtype(result, self.dtype)

    def _sum_over(self, batches: Sequence[int], V: Vectors) -> Vectors:
        """N times that, on vectors that every rank has whole."""
        count = vectors.count(V)
        sums, columns = self._inner.sums(count, self.sum_dtype), self.comm.columns(count)
        mine = set(self._parts.mine_of_columns(count))
        V_own = vectors.columns(V, columns.start, columns.stop)
        into: Vectors = sums if columns == slice(0, count) else vectors.ColumnsOf(sums, columns)
        with self.comm.summed(sums, of=V) as own, self._parts.held(), multiplying(self.precision):
            self._add_products([b for b in batches if b in mine], V_own, into, own)
        self._note(own)
        return sums.complete()

    def _divided_sum_over(self, batches: Sequence[int], V: Vectors, divided: Division) -> Vectors:
        """The same on divided ones: every block's part is gathered when its turn comes, and its sum goes where it belongs."""
        count = vectors.count(V)
        sums, columns = self.space.sums(count, self.sum_dtype).complete(), self.comm.columns(count)
        whole, of = ({name: x for name, x in X.items() if name not in divided.rows} for X in (sums, V))
        rows = {name: V[name] for name in divided.rows}
        mine = set(self._parts.mine_of_columns(count))
        V_own, sums_own = (vectors.columns(X, columns.start, columns.stop) for X in (V, sums))
        with (
            divided.exchanged(V_own, sums_own, self._parts.outside) as (V_brought, into, give_rest),
            self.comm.summed(whole, of=of, rows=rows) as own,
            self._parts.held(),
            multiplying(self.precision),
        ):
            self._add_products([b for b in batches if b in mine], V_brought, into, own)
            give_rest()
        divided.exchange.total_of_replicas([sums[name] for name in divided.rows])
        self._note(own)
        return sums

    def _add_products(self, batches: Sequence[int], V: Vectors, into: Vectors, own: Own) -> None:
        for b in batches:
            linearization, built, kept = self._graphs.get(b)
            before = 0 if built else linearization.passes
            linearization.add_product(V, into=into, last=not kept)
            self._graphs.done_with(b, linearization)
            units = self.engine.units(built, linearization.passes - before, vectors.count(V))
            own.amount += self._share(b) * units
            own.error = max(own.error, linearization.error)
            del linearization  # one that is not kept goes before the next is built

    def _note(self, own: Own) -> None:
        self._units += own.amount
        self._error = max(self._error, own.error)

    def _measure(self, engine: Auto, V: Vectors) -> None:
        """Let engine="auto" choose; what another engine has made is of no use to the one that takes over."""

        def measured() -> tuple[float, str, str]:
            first, built, kept = self._graphs.get(0)
            spent = engine.units(built, 0, 0) + engine.measure(self._parts, self._inner, V, first, kept)
            return spent, engine.chosen, engine.note

        before = engine.chosen
        spent, chosen, note = self.comm.on_first(measured)  # whose share the first batch is
        engine.choose(chosen, note)
        self._units += self._share(0) * spent
        if chosen != before:
            self._graphs.drop()

    def sampled(self, batches: int, seed: int, draw: int) -> Operator:
        return sample(self, len(self._parts.batches), batches, seed, draw)

    def narrowed(self, part: Space) -> CurvatureOfRisk:
        self.release()  # graphs kept for the whole make room for those of the part
        return CurvatureOfRisk(
            self.problem, part, self.engine.for_part(), self._graph_memory, self._kind, self.positive_semidefinite, self._microbatch,
            precision=self.precision,
        )  # fmt: skip

    def risk_and_gradient(self) -> tuple[float, Vectors]:
        """R and its gradient over the selection; of graphs only those that are kept."""
        self._make_room()
        total, gradient = torch.zeros(1, dtype=torch.float64), self._inner.sums(1, self.sum_dtype)
        # A gradient has nothing that is linear in a vector.
        precision = None if self.precision == "bfloat16" else self.precision
        with self.comm.summed({"total": total}, gradient) as own, self._parts.held(), multiplying(precision):
            for b in self._parts.mine:
                linearization, built = self._graphs.for_gradient(b)
                total += linearization.total
                spent = self.engine.units(built, 0, 0) + linearization.gradient_units
                vectors.add_(gradient, linearization.gradient())
                self._graphs.done_with(b, linearization)
                own.amount += self._share(b) * spent
                del linearization
        self._units += own.amount
        self._graphs.every_batch_seen()
        found = vectors.scale(self.space.own(gradient.complete()), 1.0 / self._parts.N)
        return float(total) / self._parts.N, vectors.in_dtype(found, self.dtype)

    def matrix_run(self, route: str) -> MatrixRun:
        """Batch by batch, on a graph of its own; an engine asked for by another name is taken at its word."""
        self._make_room()
        streamed = self._is_streamed
        if not streamed and not isinstance(self.engine, (Auto, ReverseOverReverse, ThroughOutputs)):
            return UnitVectors(self)
        ways = {"products": lambda: UnitVectors(self), "batches": lambda: self._batch_columns(route)}
        return EitherWay(ways, "products" if streamed else "batches")

    def _batch_columns(self, route: str) -> BatchColumns:
        middle = getattr(self.engine, "middle", None)
        # Graphs kept for products, those of a probe before the run included, make room for the block's own.
        self._columns.append(BatchColumns(self._parts, self._inner, route, self.release, middle, self.precision))
        return self._columns[-1]

    @property
    def draws_diagonal(self) -> bool:
        return self._kind["operator"] == "ggn" and has_sampled_diagonal(self.problem)

    def draw_diagonal(self, seed: int, number: int) -> Vectors:
        if not self.draws_diagonal:
            return super().draw_diagonal(seed, number)
        if self._sampled is None:
            self._sampled = SampledDiagonal(self._parts, self._inner, self._memory)
        self.products += 1
        with multiplying(self.precision):
            return self.space.own(self._sampled.draw(seed, number))

    @property
    def probed_groups(self) -> int:
        return self._probes().groups if self._has_probes else 0

    def probe_diagonal(self, seed: int, number: int) -> Vectors:
        if not self.probed_groups:
            return super().probe_diagonal(seed, number)
        self.products += 1
        if self._gauss_newton is not None:
            self._gauss_newton.release()
        with multiplying(self.precision):
            return self.space.own(self._probes().draw(seed, number))

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
            engine = make_output_engine(Streamed.name if self._is_streamed else "auto", OutputHessian())
            self._gauss_newton = CurvatureOfRisk(
                self.problem, self.space, engine, self._graph_memory, {"operator": "ggn"}, True, self._microbatch, self._memory,
                self.precision,
            )  # fmt: skip
        return self._gauss_newton

    @property
    def _has_probes(self) -> bool:
        """Whether this is a Hessian by exact products; an engine asked for by another name is taken at its word."""
        return (
            self._kind["operator"] == "hessian"
            and isinstance(self.engine, (Auto, ReverseOverReverse))
            and not self._is_streamed
        )

    @property
    def _is_streamed(self) -> bool:
        """Whether the streamed engine has been asked for, or has taken over for want of memory."""
        return isinstance(self.engine, Streamed) or (isinstance(self.engine, Auto) and self.engine.settled)

    def _probes(self) -> ProbedDiagonal:
        if self._probed is None:
            # Graphs kept for products make room for those of the probes, and the other way round.
            self._probed = ProbedDiagonal(self._parts, self._inner, self._graph_memory, self._graphs.drop)
        return self._probed

    def release(self) -> None:
        """Drop the kept graphs; the next product builds them again."""
        self._graphs.drop()
        for draws in (self._probed, self._sampled):
            if draws is not None:
                draws.drop()
        if self._gauss_newton is not None:
            self._gauss_newton.release()

    def _share(self, b: int) -> float:
        """The part of the data that a batch is."""
        return self._parts.counts[b] / self._parts.N

    @property
    def comm(self) -> Communicator:
        return self.problem.comm

    @property
    def units(self) -> float:
        draws = sum(made.units for made in (self._sampled, self._probed, self._gauss_newton) if made is not None)
        return self._units + draws + sum(run.units for run in self._columns)

    def describe(self) -> dict[str, Any]:
        return {
            **self._kind,
            "engine": self.engine.name,
            "engine_asked": self._asked,
            "engine_choice": self.engine.note or f"{self.engine.name}, as asked",
            "microbatch": self._microbatch,
            "precision": in_words(self.precision, self.problem.device),
            "graphs_kept": self._graphs.batches,
            "graph_bytes": self._graphs.bytes,
            "engine_error": self._error,
            "head": self._graphs.head,
            **self._kernel(),
        }

    def _kernel(self) -> dict[str, str]:
        """What gives the output Hessian, where that is a cross-entropy's."""
        middle = getattr(self.engine, "middle", None)
        if not isinstance(middle, OutputHessian) or not takes_kernel(self.problem.require_split_loss()):
            return {}
        return {"kernel": middle.kernel.note}

    def origin(self) -> dict[str, Any] | None:
        return self.problem.describe()

    # ---- precision

    @property
    def tolerance(self) -> float:
        return max(self.space.tolerance, tolerance(self.precision))

    @property
    def sum_dtype(self) -> torch.dtype:
        return sum_dtype(self.precision, self.dtype)

    def product_error(self, seed: int = 0) -> ProductError:
        self._make_room()
        source = (
            self if self.space.divided is None else self._like(self.problem, self._inner, self.engine, self.precision)
        )
        found = self.comm.on_first(lambda: measure_product_error(source, seed))
        self._measured_error = state_key(self.problem.model), found
        return found

    @property
    def known_error(self) -> ProductError | None:
        if self._measured_error is not None and self._measured_error[0] == state_key(self.problem.model):
            return self._measured_error[1]
        return self.product_error() if are_stated() else None

    def of_small(self, small: Problem) -> CurvatureOfRisk:
        """The operator of a few tokens, by the engine that runs."""
        engine = self.engine.for_part()
        if isinstance(engine, (ThroughOutputs, StreamedThroughOutputs)):
            engine.middle = rebound(engine.middle, small)
        return self._like(small, self.space, engine, self.precision)

    def reference(
        self, run: CurvatureOfRisk, twin: Problem, space: Space, precision: str | None, engine: Engine | None = None
    ) -> CurvatureOfRisk:
        """The same as `run` of a twin of its problem, by double backward or that engine: labels that `run` drew are kept."""
        own = run.engine
        if engine is None and isinstance(own, (ThroughOutputs, StreamedThroughOutputs)):
            engine = ThroughOutputs(OutputHessian("eager") if isinstance(own.middle, OutputHessian) else own.middle)
        return self._like(twin, space, engine or ReverseOverReverse(), precision)

    def _like(self, problem: Problem, space: Space, engine: Engine, precision: str | None) -> CurvatureOfRisk:
        made = CurvatureOfRisk(problem, space, engine, 0, self._kind, self.positive_semidefinite, precision=precision)
        made._has_room = True  # that was looked at for all together
        return made
