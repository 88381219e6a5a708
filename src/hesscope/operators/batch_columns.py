"""The matrix of a problem's Hessian, GGN or Fisher matrix, batch by batch: one graph at a time, for all of its batch's columns.

A = (1/N) sum over batches b of d2 l_b / dw dw, or of J_b^T M_b J_b. What comes before the first selected layer is a
constant of the graph and runs once a batch; the output projection belongs to a Hessian's loss, and is contracted where that
pays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hesscope.arithmetic import multiplying, tolerance
from hesscope.engines import Middle
from hesscope.engines.block_graph import BlockGraph
from hesscope.engines.output_block_graph import OutputBlockGraph
from hesscope.errors import HesscopeError
from hesscope.losses import CausalLMLoss, Loss, ProjectedCausalLMLoss, output_weight
from hesscope.models import named_parameters
from hesscope.operators.batch_plan import BatchPlan, Task, boxes_of, plan_batch, sequences_are_apart, watch_every_use
from hesscope.operators.graphs import half_of_free, merged, warn_of_unused
from hesscope.operators.matrix_run import MatrixRun, add_rows
from hesscope.operators.task_lists import Span, divided, nth, without_first
from hesscope.problem import Problem
from hesscope.space import Space
from hesscope.space import random as counter_based


class BatchColumns(MatrixRun):
    """Columns, through weights or through positions, whichever needs fewer products.

    Of the Hessian of the risk, or with a `middle` M of the matrix J^T M J through the outputs. `make_room` is called before
    a graph is built.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        route: str,
        make_room: Callable[[], None] = lambda: None,
        middle: Middle | None = None,
        precision: str | None = None,
    ) -> None:
        self._make_room, self._middle, self._precision = make_room, middle, precision
        self._problem, self._space = problem, space
        self.graph_bytes, self.planned_bytes = 0, 0
        self._uses, self._route = watch_every_use(problem, space), route
        self._boxes = boxes_of(problem, space, self._uses)
        self._apart = sequences_are_apart(problem, space, self._boxes)
        if route == "positions" and not self._apart:
            raise HesscopeError(
                "Expected a model that keeps the sequences of a batch apart, along the first axis of what its layers receive, for "
                "route='positions'; it turns axes round or mixes sequences of a batch; pass route='weights'."
            )
        self._forward_flops = problem.comm.on_first(self._count_flops)
        self._share = [count / problem.N for count in problem.counts]
        self._free = half_of_free(problem)
        copies = problem.comm.on_first(
            lambda: [plan.copies for plan in self._planned([self._copies] * len(problem.batches))]
        )
        self._plan(copies)
        self._divide([(0, self._ends[-1])], 0)
        self._by_name = {c.name: c for c in space.coordinates}
        self._built: tuple[int, BlockGraph] | None = None
        self._unused: dict[int, set[str]] = {}
        self._check: Tensor | None = None
        self._kept_check: Tensor | None = None
        self._form = ""
        #: Forward passes over the data, by count of multiplications, and of one product with each parameter's columns.
        self.units, self._spent = 0.0, 0.0
        self.pass_units: dict[str, float] = {}

    def _count_flops(self) -> int:
        """Of a forward pass over the first batch."""
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            self._problem.total(0)
        return int(forward.get_total_flops())

    def _planned(self, most_copies: Sequence[Callable[[int], int]]) -> list[BatchPlan]:
        """A plan of every batch, with so many copies of it at once."""
        return [
            plan_batch(self._problem, b, self._space, self._boxes, self._uses[b], self._route, self._apart, most)
            for b, most in enumerate(most_copies)
        ]

    def _plan(self, copies: Sequence[int]) -> None:
        """Plan every batch, with at most so many copies of it at once."""
        self._plans = self._planned([partial(min, most) for most in copies])
        self._ends = list(accumulate(plan.tasks for plan in self._plans))
        #: The batch that is looked at for whether positions are of one sequence each; one of a single sequence shows nothing.
        through = [b for b, plan in enumerate(self._plans) if plan.through_positions]
        self._looked_at = next((b for b in through if self._plans[b].sequences > 1), through[0] if through else None)
        self.graphs = len(self._plans)
        self.products = sum(share * plan.products for share, plan in zip(self._share, self._plans, strict=True))

    def _divide(self, left: list[Span], rounds: int) -> None:
        """Give every rank a part of the batches' tasks that are left, after so many rounds in which each has done one."""
        load = [self._share[b] / plan.tasks * plan.products for b, plan in enumerate(self._plans)]
        self._lists = divided(left, self._ends, load, self._problem.comm.ranks, self._whole())
        self._rounds, self._round = rounds, rounds
        self.tasks = rounds + max(sum(stop - start for start, stop in spans) for spans in self._lists)

    def _whole(self) -> Span:
        """The tasks of the unit through positions that is held against one through weights: one rank's."""
        if self._looked_at is None:
            return 0, 0
        start = self._ends[self._looked_at - 1] if self._looked_at else 0
        for part in self._plans[self._looked_at].parts:
            if part.by_position:
                return start, start + part.tasks // part.units
            start += part.tasks
        return 0, 0

    def is_shared(self, task: int) -> bool:
        return True

    def settle(self) -> None:
        comm, own = (
            self._problem.comm,
            (self._unused, self._form, self.graph_bytes, self.planned_bytes, self.pass_units),
        )
        everyone = comm.gathered(own)
        self._unused = merged([unused for unused, *_ in everyone])
        self._form = next((form for _, form, *_ in everyone if form), "")
        self.graph_bytes = max(held for _, _, held, *_ in everyone)
        self.planned_bytes = max(planned for *_, planned, _ in everyone)
        self.pass_units = {name: units for *_, found in reversed(everyone) for name, units in found.items()}
        with comm.summed() as spent:
            spent.amount, self._spent = self._spent, 0.0
        self.units += spent.amount
        checks = comm.gathered(self._check is not None)
        self._kept_check = comm.on(checks.index(True), lambda: self._check) if any(checks) else None
        if self._round == self.tasks:
            warn_of_unused(self._unused, len(self._plans))

    def _left(self) -> list[Span]:
        """The tasks that no rank has done yet."""
        done = self._round - self._rounds
        return [span for spans in self._lists for span in without_first(spans, done)]

    def state(self) -> dict[str, Any]:
        return {
            "rounds": self._round,
            "left": [list(span) for span in self._left()],
            "copies": [plan.copies for plan in self._plans],  # came from the memory that was free
            "unused": [[b, sorted(names)] for b, names in self._unused.items()],
            "check": self._kept_check,
            "form": self._form,
            "graph_bytes": self.graph_bytes,
            "pass_units": self.pass_units,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._plan(state["copies"])
        self._divide([(start, stop) for start, stop in state["left"]], state["rounds"])
        self._unused = {b: set(names) for b, names in state["unused"]}
        start, stop = self._whole()
        own = any(a < stop and start < b for a, b in self._lists[self._problem.comm.rank])
        self._check = state["check"].to(self._space.device) if own and state["check"] is not None else None
        self._form, self.graph_bytes, self.pass_units = state["form"], state["graph_bytes"], state["pass_units"]

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        """A round: every rank does the next task of its own."""
        self._round = task + 1
        own = nth(self._lists[self._problem.comm.rank], task - self._rounds)
        with multiplying(self._precision):
            return 0.0 if own is None else self._run(own, into, weight)

    def _run(self, task: int, into: Tensor, weight: float) -> float:
        b = bisect_right(self._ends, task)
        plan, graph = self._plans[b], self._graph(b)
        work, share = plan.task(task - (self._ends[b - 1] if b else 0)), self._share[b]
        counter = FlopCounterMode(display=False) if work.name not in self.pass_units else None
        is_checked = b == self._looked_at and work.unit == 0 and work.name == next(iter(plan.through_positions))
        with counter or torch.no_grad():
            if into.dim() == 1 and work.unit is not None and not is_checked:
                self._add_own(plan, graph, work, into, weight / self._problem.N)
            else:
                rows_j, rows_kn = self._rows(plan, graph, work)
                self._add(plan, work.name, rows_j, rows_kn, into, weight / self._problem.N)
        if counter is not None:
            self.pass_units[work.name] = self._units(counter, work, b)
        if is_checked:
            self._hold_against_weights(plan, graph, work, rows_kn, rows_j)
        self._spent += share * work.products * self.pass_units[work.name]
        self._unused.setdefault(b, set(graph.unused))
        following = nth(self._lists[self._problem.comm.rank], self._round - self._rounds)
        if following is None or bisect_right(self._ends, following) != b:
            self._built = None
        return share * work.products

    def describe(self) -> dict[str, Any]:
        routes = [
            "weights" if not plan.through_positions else
            "positions" if len(plan.through_positions) == len(plan.parts) else "both" for plan in self._plans
        ]  # fmt: skip
        return {
            "route": routes[0] if len(set(routes)) == 1 else "both",
            "copies": max(plan.copies for plan in self._plans),
            "output_projection": self._form,
            "graph_bytes": self.graph_bytes,
            "planned_bytes": self.planned_bytes,
            "forward_passes_a_product": self.pass_units,
        }

    # ---- one task

    def _rows(self, plan: BatchPlan, graph: BlockGraph, work: Task) -> tuple[Tensor, Tensor]:
        """Places j in the selection, and what this task adds to the rows A[j, :]."""
        c, start = self._by_name[work.name], self._space.slices[work.name].start
        places = torch.tensor(work.places)
        if work.unit is None:
            return (start + places).to(self._space.device), graph.columns(c, places)
        box, X_STc, device = self._boxes[work.name], graph.inputs(work.name), self._space.device
        mine = (box.unit_at == work.unit).nonzero()[:, 0]
        j = (start + mine).to(device)
        if X_STc is None:
            return j, torch.zeros(len(mine), self._space.size, dtype=self._space.dtype, device=device)
        M_QSn = torch.cat([graph.responses(work.name, work.unit, q) for q in torch.split(places, plan.copies)])
        X_SQj = X_STc[:, places.to(X_STc.device)][..., box.input_at[mine]].to(device, M_QSn.dtype)
        return j, X_SQj.permute(2, 1, 0).flatten(1) @ M_QSn.flatten(0, 1)

    def _add_own(self, plan: BatchPlan, graph: BlockGraph, work: Task, into_n: Tensor, weight: float) -> None:
        """Add what a unit's positions give to the diagonal, without the rest of its rows."""
        box, X_STc = self._boxes[work.name], graph.inputs(work.name)
        if X_STc is None:
            return
        places, mine = torch.tensor(work.places), (box.unit_at == work.unit).nonzero()[:, 0]
        j = (self._space.slices[work.name].start + mine).to(into_n.device)
        found = [graph.responses(work.name, work.unit or 0, q)[..., j] for q in torch.split(places, plan.copies)]
        X_SQj = X_STc[:, places.to(X_STc.device)][..., box.input_at[mine]].to(into_n.device, into_n.dtype)
        into_n[j] += weight * (X_SQj.transpose(0, 1) * torch.cat(found)).sum((0, 1))

    def _add(self, plan: BatchPlan, name: str, j: Tensor, rows_kn: Tensor, into: Tensor, weight: float) -> None:
        """Add to the rows A[j, :], and to columns A[:, j] of parameters that do not find them themselves.

        Rows through positions lack what earlier layers do to this layer's input; those entries come from the earlier
        layers' own rows, by symmetry.
        """
        if into.dim() == 1:
            add_rows(into, j, rows_kn, weight)
            return
        for other, part in self._space.slices.items():
            if self._is_whole(plan, name, other):
                into[j, part] += weight * rows_kn[:, part]
            if other != name and not self._is_whole(plan, other, name):
                into[part, j] += weight * rows_kn[:, part].T

    def _is_whole(self, plan: BatchPlan, name: str, other: str) -> bool:
        """Whether the rows of one parameter are right in the columns of another."""
        return name not in plan.through_positions or plan.order[other] >= plan.order[name]

    def _hold_against_weights(self, plan: BatchPlan, graph: BlockGraph, work: Task, rows_kn: Tensor, j: Tensor) -> None:
        """Sum up the first unit through positions; once it is whole, hold it against one product through weights."""
        if work.places.start == 0:
            self._check = torch.zeros_like(rows_kn)
        if self._check is None:
            return
        self._check += rows_kn
        if work.places.stop < plan.through_positions[work.name].length:
            return
        box, start = self._boxes[work.name], self._space.slices[work.name].start
        signs_j = counter_based.signs(counter_based.stream_key(0, "route"), torch.arange(len(j))).to(self._check)
        v_b = torch.zeros(box.shape[0] * box.shape[1], dtype=self._check.dtype, device=self._check.device)
        v_b[box.place[(j - start).to(box.device)].to(v_b.device)] = signs_j
        coordinates = self._space.coordinates
        right_n = torch.cat([torch.full((c.size,), self._is_whole(plan, work.name, c.name)) for c in coordinates])
        found_n, expected_n = signs_j @ self._check, graph.product(work.name, v_b.view(box.shape))
        limit = max(self._space.tolerance, tolerance(self._precision))
        _require_same(work.name, found_n[right_n], expected_n[right_n], limit)
        self._check = None

    # ---- one batch

    def _graph(self, b: int) -> BlockGraph:
        if self._built is None or self._built[0] != b:
            self._built = None  # the old graph goes before the new one is built
            self._built = b, self._build(b, self._plans[b])
        return self._built[1]

    def _build(self, b: int, plan: BatchPlan) -> BlockGraph:
        self._make_room()
        loss: Loss | None = None
        if self._middle is None and isinstance(self._problem.loss, CausalLMLoss) and not self._selects_projection():
            loss = ProjectedCausalLMLoss(self._problem.loss, plan.products, plan.copies)
        graph = self._make_graph(b, frozenset(plan.through_positions), plan.copies, plan.sequences, loss)
        held, moment = graph.bytes, graph.bytes
        if isinstance(loss, ProjectedCausalLMLoss):
            self._form, held, moment = loss.form, held + loss.bytes, moment + loss.transient_bytes
        self.graph_bytes = max(self.graph_bytes, held)
        # What is kept, what a pass through it or its making takes beyond that for a moment, and half as much again for
        # what an allocator does not give back.
        self.planned_bytes = max(self.planned_bytes, (held + moment) * 3 // 2)
        self._spent += self._share[b] * 3 * plan.copies
        return graph

    def _make_graph(
        self, b: int, through: frozenset[str], copies: int, sequences: int, loss: Loss | None = None
    ) -> BlockGraph:
        where = (self._problem, b, self._space, self._boxes, through, copies, sequences)
        return BlockGraph(*where, loss) if self._middle is None else OutputBlockGraph(*where, self._middle)

    def _selects_projection(self) -> bool:
        weight, named = output_weight(self._problem.model), named_parameters(self._problem.model)
        return any(named[name] is weight for name in self._space.names)

    def _copies(self, wanted: int) -> int:
        """At most half of what a rank may take for the graph; one copy's size is measured, on the first batch."""
        if wanted <= 1:
            return 1
        if not self.graph_bytes:
            self.graph_bytes = self._make_graph(0, frozenset(), 1, 1).bytes
        return max(1, min(wanted, self._free // max(self.graph_bytes, 1)))

    def _units(self, counter: FlopCounterMode, work: Task, b: int) -> float:
        """Forward passes of one product; devices whose backward pass is not counted get the usual two."""
        forward = self._forward_flops * self._problem.counts[b] / max(self._problem.counts[0], 1)
        found = counter.get_total_flops()
        return found / work.products / forward if found and forward else 2.0


def _require_same(name: str, found_n: Tensor, expected_n: Tensor, tolerance: float) -> None:
    gap, scale = float((found_n - expected_n).norm()), float(expected_n.norm())
    if not gap <= tolerance * scale:
        raise HesscopeError(
            f"Through positions and through weights the columns of {name} differ by {gap / max(scale, 1e-300):.1e} of their "
            "norm: this model mixes sequences of a batch; pass route='weights'."
        )
