"""The numbers worth remembering of each result, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hesscope.figures.numbers import number, share, with_error
from hesscope.figures.subject import selection_line, unit
from hesscope.results import (
    Block,
    Density,
    Diagonal,
    Eigenpairs,
    LanczosRun,
    Result,
    Structure,
    StructureComparison,
    Trace,
    Verification,
)

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, str, str]
COLUMNS = ("quantity", "value", "error", "cost")


@dataclass(frozen=True)
class KeyNumber:
    """One row, in words. `where`, the selection, and the cost stand on a result's first row only."""

    quantity: str
    where: str
    value: str
    error: str
    cost: str


def key_rows(results: Sequence[Result]) -> list[list[KeyNumber]]:
    """The rows of each result; the selection is left out where all results share one."""
    shared = len({selection_line(result) for result in results}) == 1
    return [_group(result, "" if shared else selection_line(result)) for result in results]


def key_numbers(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Rows of (quantity, value, error, cost) in words."""
    rows = [row for group in key_rows(results) for row in group]
    return [(", ".join(part for part in (r.quantity, r.where) if part), r.value, r.error, r.cost) for r in rows]


def caption(results: Sequence[Result]) -> str:
    """The selection, where all results share one, and the units."""
    selections = {selection_line(result) for result in results}
    where = selections.pop() if len(selections) == 1 else ""
    units = sorted({unit(result) for result in results if result.kind not in ("verify", "structure-comparison")} - {""})
    return ". ".join(part for part in (where, f"Curvature in {' or '.join(units)}" if units else "") if part)


def key_number_table(results: Sequence[Result]) -> Table:
    """The key numbers as a table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Names such as weight[0:4] are text, not markup.
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption(results)), caption_justify="left", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="right" if name == "value" else "left")
    for group in key_rows(results):
        for row in group:
            quantity = Text.assemble(row.quantity, (f"\n{row.where}" if row.where else "", "dim"))
            table.add_row(quantity, Text(row.value, "bold"), Text(row.error), Text(row.cost, "dim"))
    return table


def _group(result: Result, where: str) -> list[KeyNumber]:
    build = _BUILDERS.get(type(result))
    rows = build(result) if build else [(result.kind, result.summary().splitlines()[0], "")]
    first, *rest = rows
    return [
        KeyNumber(first[0], where, first[1], first[2], _cost(result)),
        *(KeyNumber(r[0], "", r[1], r[2], "") for r in rest),
    ]


def _cost(result: Result) -> str:
    passes = f"{result.units:,.0f} passes, " if result.units else ""
    return f"{result.products:,} products, {passes}{result.seconds:.1f} s"


def _block(block: Block) -> list[Row]:
    n = len(block.labels)
    entries = block.matrix.double().flatten()
    strongest = float(entries[entries.abs().argmax()])
    return [
        (f"Largest entry of the {n} × {n} block", number(strongest), f"asymmetry {block.asymmetry:.1e}"),
        ("Its trace", number(float(block.matrix.double().trace())), "exact"),
    ]


def _density(density: Density) -> list[Row]:
    trace, error = density.trace
    used = density.nodes[density.weights > 0]
    reach = f"{number(float(used.min()))} to {number(float(used.max()))}"
    return [
        ("Trace from the spectral density", *_estimate(trace, error)),
        ("Reach of the quadrature nodes", reach, "inside the spectrum"),
    ]


def _diagonal(diagonal: Diagonal) -> list[Row]:
    flat = diagonal.flat().double()
    exact = diagonal.method == "exact"
    error = "exact" if exact else f"relative error of the diagonal about {number(diagonal.relative_error, 2)}"
    return [
        ("Mean of the diagonal", number(float(flat.mean())), error),
        ("Largest diagonal entry", number(float(flat.max())), "exact" if exact else "estimate"),
        ("Negative diagonal entries", share(float((flat < 0).double().mean())), "exact" if exact else "with noise"),
    ]


def _eigs(pairs: Eigenpairs) -> list[Row]:
    values = pairs.eigenvalues.double()
    rows = [("Largest eigenvalue", int(values.argmax()))]
    if len(values) > 1:
        low = int(values.argmin())
        rows.append(("Most negative eigenvalue found" if values[low] < 0 else "Smallest eigenvalue found", low))
    residuals = torch.where(pairs.residuals.isfinite(), pairs.residuals, torch.inf).tolist()
    state = "" if pairs.converged else "; not all converged"
    return [(name, number(float(values[i])), f"residual {residuals[i]:.1e}{state}") for name, i in rows]


def _lanczos(run: LanczosRun) -> list[Row]:
    reach = f"{number(float(run.nodes.min()))} to {number(float(run.nodes.max()))}"
    return [(f"Reach of {len(run.nodes)} Lanczos nodes", reach, f"residual norm {run.residual_norm:.1e}")]


def _structure(structure: Structure) -> list[Row]:
    inside, chance = (float(x[:4].sum()) for x in (structure.shares, structure.chance))
    s = structure.spectrum
    zeros = f"{s.zeros} of {s.size} zero to rounding"
    return [
        ("Energy inside blocks", share(inside), f"chance {share(chance)}"),
        ("Energy on the diagonal", share(float(structure.shares[0])), f"chance {share(float(structure.chance[0]))}"),
        ("Negative eigenvalues", share(s.negative_share), f"{share(s.negative_trace)} of the absolute trace; {zeros}"),
        ("Condition above rounding", number(s.condition_above, 3), f"effective rank {number(s.effective_rank, 3)}"),
    ]


def _structures(comparison: StructureComparison) -> list[Row]:
    inside, chance = (x[:, :4].sum(1).tolist() for x in (comparison.shares, comparison.chance))
    return [
        (f"Energy inside blocks, {name}", share(part), f"chance {share(level)}")
        for name, part, level in zip(comparison.cases, inside, chance, strict=True)
    ]


def _trace(trace: Trace) -> list[Row]:
    if trace.method == "exact":
        return [("Trace", number(trace.estimate, 5), "exact")]
    low, high = trace.interval()
    value, error = _estimate(trace.estimate, trace.standard_error)
    return [("Trace", value, f"{error} (95%: {number(low)} to {number(high)})")]


def _verification(verification: Verification) -> list[Row]:
    outcomes = verification.outcomes()
    pairs = zip(verification.measured.tolist(), verification.limits.tolist(), strict=True)
    ratios = [measured / limit if limit else measured for measured, limit in pairs]
    finite = all(map(math.isfinite, ratios))
    worst = f"worst at {number(max(ratios, default=0.0), 2)} × its limit" if finite else "some are not finite"
    return [("Checks passed", f"{sum(outcomes)} of {len(outcomes)}", worst)]


def _estimate(value: float, error: float) -> tuple[str, str]:
    """`6.98` and `± 0.37`, with the digits that the error allows."""
    known, _, spread = with_error(value, error).partition(" ± ")
    if known.startswith("("):
        spread, _, power = spread.partition(")")
        known, spread = known[1:] + power, spread + power
    return known, f"± {spread}"


_BUILDERS: dict[type[Result], Callable[[Any], list[Row]]] = {
    Block: _block,
    Density: _density,
    Diagonal: _diagonal,
    Eigenpairs: _eigs,
    LanczosRun: _lanczos,
    Structure: _structure,
    StructureComparison: _structures,
    Trace: _trace,
    Verification: _verification,
}
