"""`hesscope structure --plan`: what a run would take, from configurations alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from hesscope.cli.cases import Case, cases
from hesscope.cli.options import CommonOptions
from hesscope.cli.running import make_space, model_source

if TYPE_CHECKING:
    from torch import nn

    from hesscope.space import Space

_GIB = 2**30
_MOST_LABELS = 200_000


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
