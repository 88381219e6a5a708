"""What an exact diagonal will take, measured on a few of its columns."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.algorithms.progress import duration
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.operators.matrix_run import MatrixRun, matrix_run

#: Places in the work, evenly spread, at which two tasks in a row are run: the first may build a graph, the second does not.
_PLACES = 3


@dataclass(frozen=True)
class ExactPlan:
    """Products, forward passes and seconds of an exact diagonal, and the bytes that its graphs take at most.

    `products` is counted; `units` and `seconds` are those of the columns that were run, for all of them. `slowest` is what it
    would take if every column were as slow as the slowest of those.
    """

    size: int
    route: str
    products: int
    units: float
    seconds: float
    slowest: float
    graph_bytes: int

    def summary(self) -> str:
        """The plan in words."""
        if self.products == 0:
            return f"exact diagonal of {self.size:,} weights: known without products"
        lines = [
            f"exact diagonal of {self.size:,} weights, through {self.route}",
            f"  products        {self.products:,}" + f" ({self.size / self.products:.1f} times fewer than weights)" * (self.products < self.size),
            f"  forward passes  about {self.units:,.0f}",
            f"  time            about {duration(self.seconds)}; {duration(self.slowest)} if every column were as slow as the slowest measured",
            f"  graphs          {self.graph_bytes / 2**20:,.0f} MiB at most",
        ]  # fmt: skip
        return "\n".join(lines)


@dataclass(frozen=True)
class _Cost:
    """Seconds and forward passes of one product at one place of the work, and of making a graph there."""

    seconds: float
    units: float
    graph_seconds: float
    graph_units: float


def plan_exact_diagonal(H: Operator) -> ExactPlan:
    """Run a few columns of an exact diagonal and say what all of them would take.

    The number of products is counted, through weights or through positions, whichever needs fewer; a product's seconds and
    forward passes are those of two tasks at each of three places in the work, which costs a few products and graphs. The
    operator's kept graphs are released.

    Raises:
        HesscopeError: an operator without coordinates to plan for.

    Example:
        >>> import torch, hesscope as hs
        >>> print(hs.plan_exact_diagonal(hs.operator(torch.eye(3))).products)
        3
    """
    if not isinstance(H, Operator):
        raise HesscopeError(f"Expected an operator, such as hs.hessian(problem), got {type(H).__name__}.")
    n = H.space.size
    if H.knows_diagonal:
        return ExactPlan(n, "known factors", 0, 0.0, 0.0, 0.0, 0)
    run = matrix_run(H)
    costs = _costs(H, run)
    graph_seconds = run.graphs * max((cost.graph_seconds for cost in costs), default=0.0)
    graph_units = run.graphs * max((cost.graph_units for cost in costs), default=0.0)
    each = [cost.seconds for cost in costs] or [0.0]
    described = run.describe()
    return ExactPlan(
        size=n,
        route=str(described.get("route", "terms of a sum")),
        products=max(1, round(run.products)),
        units=graph_units + run.products * sum(cost.units for cost in costs) / len(each),
        seconds=graph_seconds + run.products * sum(each) / len(each),
        slowest=graph_seconds + run.products * max(each),
        graph_bytes=int(described.get("planned_bytes", 0)),
    )


def _costs(H: Operator, run: MatrixRun) -> list[_Cost]:
    """Two tasks in a row at every place, of which one at most begins another batch; none runs twice."""
    into = torch.zeros(H.space.size, dtype=H.dtype, device=H.space.device)
    starts = {2 * round(i * max(run.tasks // 2 - 1, 0) / (_PLACES - 1)) for i in range(_PLACES)}
    found = []
    for start in sorted(starts):
        done = [_timed(H, run, task, into) for task in range(start, min(start + 2, run.tasks))]
        done = [task for task in done if task[0] > 0]  # some terms of a sum take no products
        if done:
            seconds, units = (min(task[i] / task[0] for task in done) for i in (1, 2))
            beyond = (max(task[i] - each * task[0] for task in done) for i, each in ((1, seconds), (2, units)))
            found.append(_Cost(seconds, units, *beyond))
    release = getattr(H, "release", None)
    if release is not None:
        release()
    return found


def _timed(H: Operator, run: MatrixRun, task: int, into: Tensor) -> tuple[float, float, float]:
    """Products, seconds and forward passes of one task."""
    units, began = H.units, time.perf_counter()
    products = run.run(task, into)
    run.settle()
    return products, time.perf_counter() - began, H.units - units
