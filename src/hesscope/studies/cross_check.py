"""An exact block against finite differences of the gradient and of the loss."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms import block as compute_block
from hesscope.algorithms.driver import provenance
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.figures.subject import operator_of
from hesscope.operators import hessian
from hesscope.problem import Problem, select
from hesscope.problem.precision import in_float64
from hesscope.results import Block, Verification
from hesscope.results.verification import Check, columns_of
from hesscope.space import Space
from hesscope.studies.differences import Differences, Measured

#: Roundings of the block, each as large as its measured asymmetry, that an entry may be off by.
_ROUNDINGS = 10.0


def cross_check(
    problem: Problem,
    space: Space | None = None,
    *,
    columns: int = 6,
    entries: int = 12,
    block: Block | None = None,
    seed: int = 0,
) -> Verification:
    """Hold an exact block to central finite differences of the gradient, and of the loss, in float64.

    1. gradient differences: chosen columns against (g(theta + h e_j) - g(theta - h e_j)) / 2h. It finds wrong second
       derivatives.
    2. loss differences: chosen entries against four values of the loss (three on the diagonal), without any derivative. It
       also finds a wrong gradient, to which the first check is blind.

    Every difference is taken at two step sizes and bounds its own error; a check passes if every column or entry agrees
    within that error and the block's own rounding. Discrepancy and limit are relative to the largest checked column's norm
    or entry; what is reported is the column or entry that comes closest to its limit, or exceeds it most.

    Args:
        space: from `hesscope.select`; every trainable parameter by default.
        columns: how many columns: the larger half by norm, the others drawn by `seed`.
        entries: how many entries, between the chosen columns: the larger half by magnitude, the others drawn.
        block: the block to check; by default `hs.block` of a float64 copy of the model.
        seed: of the draws.

    Raises:
        HesscopeError: a block of another problem, selection or operator, or nothing to check.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(2, 1).double()
        >>> batch = (torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1, 1).double())
        >>> hs.cross_check(hs.supervised(model, [batch], loss="mse")).passed
        True
    """
    began = time.perf_counter()
    space = (select(problem) if space is None else space).whole
    if columns < 1 or entries < 1:
        raise HesscopeError(f"Expected at least one column and one entry to check, got {columns} and {entries}.")
    twin, wide = in_float64(problem, space)
    H = hessian(twin, wide)
    if block is None:
        block, spent = compute_block(H), (H.products, H.units)
    else:
        _require_same(block, problem, space)
        spent = (0, 0.0)
    differences = Differences(twin, wide, seed)
    B = block.matrix.to("cpu", torch.float64)
    J = _choose(B.norm(dim=0), columns, seed)
    pairs = [(J[a], J[b]) for a in range(len(J)) for b in range(a, len(J))]
    picked = [pairs[k] for k in _choose(torch.stack([B[i, j].abs() for i, j in pairs]), entries, seed)]
    rounding = _ROUNDINGS * max(block.asymmetry, torch.finfo(block.matrix.dtype).eps) * float(B.abs().max())
    checks = [
        _check(
            "gradient differences",
            f"{len(J)} columns, central differences of the gradient",
            [(block.labels[j], B[:, j], differences.column(j)) for j in J],
            rounding * len(B) ** 0.5,
        ),
        _check(
            "loss differences",
            f"{len(picked)} entries, central differences of the loss",
            [(_pair(block.labels, i, j), B[i, j], differences.entry(i, j)) for i, j in picked],
            rounding,
        ),
    ]
    _warn_of_weak(checks)
    options = {"columns": J, "entries": [list(pair) for pair in picked], "seed": seed, "block_given": spent == (0, 0.0)}
    return Verification(
        products=spent[0],
        units=spent[1] + differences.units,
        seconds=time.perf_counter() - began,
        provenance=provenance(H, options) | {"problem": problem.describe(), "probe": None},
        **columns_of(checks),
    )


def _check(name: str, what: str, found: list[tuple[str, Tensor, Measured]], rounding: float) -> Check:
    """The worst of several comparisons, by discrepancy over limit."""
    scale = max(float(exact.norm()) for _, exact, _ in found) or 1.0

    def outcome(label: str, exact: Tensor, difference: Measured) -> tuple[float, float, float, str]:
        gap, limit = float((exact - difference.value).norm()), difference.error + rounding
        return gap / limit if limit > 0 else (0.0 if gap == 0 else float("inf")), gap / scale, limit / scale, label

    _, measured, limit, label = max(outcome(*one) for one in found)
    return Check(name, f"{what}; the worst at {label}", measured, limit)


def _warn_of_weak(checks: list[Check]) -> None:
    for check in checks:
        if check.limit > 0.5:
            warnings.warn(
                f"The {check.name} know the block only to {check.limit:.1g} of its largest checked values, so that passing "
                "says little; rounding inside the model is too coarse, or the loss is not smooth there.",
                HesscopeWarning,
                stacklevel=3,
            )


def _choose(sizes: Tensor, wanted: int, seed: int) -> list[int]:
    """So many places, in order: the larger half by size, the others at random."""
    order = sizes.argsort(descending=True, stable=True).tolist()
    largest, rest = order[: (wanted + 1) // 2], order[(wanted + 1) // 2 :]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(largest + [rest[k] for k in drawn[: wanted - len(largest)]])


def _pair(labels: list[str], i: int, j: int) -> str:
    return labels[i] if i == j else f"{labels[i]}, {labels[j]}"


def _require_same(block: Any, problem: Problem, space: Space) -> None:
    if not isinstance(block, Block):
        raise HesscopeError(f"Expected block= to be a block, from hs.block or hs.load, got {type(block).__name__}.")
    described = block.provenance.get("problem") or {}
    if described.get("fingerprint") != problem.fingerprint:
        raise HesscopeError(
            "Expected a block of this problem, but its fingerprint is another: model, data or loss differ."
        )
    if block.labels != space.labels:
        raise HesscopeError(
            "Expected a block over this selection, but its coordinates are others; select the same weights."
        )
    # Of a perplexity, what the rank-one update is added to: that of a Gauss-Newton matrix is none of the Hessian.
    kind = operator_of(block).get("operator")
    if kind != "hessian":
        raise HesscopeError(f"Expected a block of the Hessian, for that is what differences give, got one of {kind!r}.")
