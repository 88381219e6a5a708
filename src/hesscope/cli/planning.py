"""`hesscope plan`, and `hesscope structure --plan`: what a run would take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hesscope.cli.cases import Case, cases
from hesscope.cli.options import CommonOptions
from hesscope.cli.running import make_problem, make_space, model_source, output_folder, write_run
from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from torch import nn

    from hesscope.problem import Problem
    from hesscope.results import Plan
    from hesscope.space import Space

_GIB = 2**30
_MOST_LABELS = 200_000


def run_plan(common: CommonOptions, what: str, products: int | None, measure: bool) -> None:
    """Print a plan; write its folder where one is named."""
    from hesscope.planning import plan

    if common.output_dir is not None:
        output_folder(common, "plan")
    problem = _without_weights(common) if common.data is None and common.model is not None else make_problem(common)
    engines = None if common.engine == "auto" else [common.engine]
    operator = common.operator
    found = plan(problem, make_space(common, problem), operator, what, products, engines, common.memory, measure)
    Console(highlight=False).print(_table(found))
    lines = [f"{name}: {row['remark']}" for name, row in found.engines.items() if "peak_bytes" not in row]
    lines += found.summary().splitlines()[-2:]
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)
    if common.output_dir is not None:
        own = {"what": what, "products": products, "measure": measure}
        write_run(found, common.output_dir, {**dataclasses.asdict(common), **own}, overwrite=common.overwrite)
        Console(highlight=False, soft_wrap=True).print(f"written to {common.output_dir}", markup=False)


def run_cluster_plan(common: CommonOptions, ranks: int, **stated: Any) -> None:
    """Print what a product takes on every rank of a cluster."""
    from hesscope.planning import plan_cluster

    if common.data is not None or common.output_dir is not None:
        raise HesscopeError(
            "Expected no --data and no --output-dir with --ranks: the plan is of a configuration, and printed."
        )
    if common.model is None:
        raise HesscopeError("Expected --model: a Hub id, a folder with a config.json, or 'demo'.")
    problem = _without_weights(common)
    found = plan_cluster(problem, make_space(common, problem), ranks, common.layout, **stated)
    of = f"{found.shape.weights:,} weights, {found.shape.coordinates:,} selected; {ranks} ranks, --layout {common.layout}"
    lines = [
        f"a Hessian product on every rank: {of}",
        found.summary(),
        "a prediction from the model's shape: nothing was run",
    ]
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)


def _without_weights(common: CommonOptions) -> Problem:
    from hesscope.planning import skeleton_problem

    shape = common.length, min(common.batch_size, common.sequences or common.batch_size), common.sequences
    return skeleton_problem(_skeleton(common), *shape, loss=common.loss, objective=common.objective)


def _table(found: Plan) -> Table:
    from hesscope.results.plan import in_bytes, in_seconds

    title = f"{found.what}: at most {found.wanted_products:,} products; {in_bytes(found.memory)} free"
    table = Table(title=title, title_justify="left")
    for name, side in (
        ("engine", "left"),
        ("a product", "right"),
        ("in all", "right"),
        ("peak memory", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for name, row in found.engines.items():
        if "peak_bytes" not in row:
            table.add_row(name, "", "", "", "does not run")
            continue
        times = in_seconds(row["further_seconds"]), in_seconds(row["total_seconds"])
        table.add_row(name, *times, in_bytes(row["peak_bytes"]), "fits" if row["fits"] else "does not fit")
    return table


def plan_structure(common: CommonOptions, losses: str | None) -> None:
    """Print the plan of every case; models are built without weights, and no text is read."""
    console = Console(highlight=False, soft_wrap=True)
    for of_model in cases(common, losses):
        console.print("\n".join(_lines(of_model)), markup=False)


def _lines(of_model: list[Case]) -> list[str]:
    from hesscope.algorithms.planning import plan_block
    from hesscope.engines import make_engine

    common = of_model[0].common
    model = _skeleton(common)
    space = make_space(common, model)
    plan = plan_block(space.size, space.dtype.itemsize, make_engine(common.engine))
    count, weights_bytes = _weights(model)
    rows = {
        "weights": f"{count:,} in {common.dtype or 'float32'}, {_bytes(weights_bytes)}",
        "selected": f"n = {plan.size:,}",
        **_groups(space),
        "cases": f"{len(of_model)} ({', '.join(case.loss for case in of_model)}); what follows is for each",
        "products": f"at most {plan.products:,}"
        + f", after {plan.probe_products} to check" * (plan.probe_products > 0),
        "forward passes": f"about {plan.passes:,.0f}",
        "arithmetic": _arithmetic(count, common, plan.passes),
        "the matrix": f"{_bytes(plan.matrix_bytes)}; matrices at their peak {_bytes(plan.peak_bytes)}",
        "not in this": "activations and graphs of the batches, which depend on --length and --batch-size",
    }
    return [f"plan for {common.model}: nothing was loaded or run", *(f"  {k:14}  {v}" for k, v in rows.items())]


def _groups(space: Space) -> dict[str, str]:
    """Layers, blocks and chance levels, which take a label a coordinate: not for whole models."""
    from hesscope.algorithms.membership import membership
    from hesscope.results.energy import CLASSES
    from hesscope.results.structure import grouping, percent

    if space.size > _MOST_LABELS:
        return {"layers": f"{len(space.coordinates)} parameters; with so many weights no exact matrix is possible"}
    members = membership(space.labels, space.describe())
    parts = zip(CLASSES, members.entries().tolist(), strict=True)
    chance = ", ".join(f"{name} {percent(k / space.size**2)}" for name, k in parts)
    return {"layers": grouping(members.layers, members.blocks), "chance": chance}


def _skeleton(common: CommonOptions) -> nn.Module:
    from hesscope.models import load_skeleton
    from hesscope.models.loading import resolve_dtype

    hub = {} if common.revision is None else {"revision": common.revision}
    return load_skeleton(model_source(common), resolve_dtype(common.dtype), **hub)


def _weights(model: nn.Module) -> tuple[int, int]:
    """How many weights, tied ones once, and the bytes of parameters and buffers."""
    parameters = list(model.parameters())
    held = sum(t.numel() * t.dtype.itemsize for t in [*parameters, *model.buffers()])
    return sum(p.numel() for p in parameters), held


def _arithmetic(weights: int, common: CommonOptions, passes: float) -> str:
    """Two operations a weight and token in a forward pass; attention's own are not in it."""
    if common.length is None or common.sequences is None:
        return "unknown without --length and --sequences"
    tokens = common.length * common.sequences
    operations = 2.0 * weights * tokens * passes
    return f"about {operations:.1e} operations (2 a weight and token, {tokens:,} tokens a pass)"


def _bytes(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"
