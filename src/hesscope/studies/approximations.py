"""Approximations of a curvature matrix against its exact block: parts of itself, Gauss-Newton, Fisher, K-FAC, EKFAC."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms import block
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.algorithms.driver import provenance
from hesscope.algorithms.identity import other_matrix
from hesscope.algorithms.membership import Membership, membership
from hesscope.errors import HesscopeError
from hesscope.operators import Operator, fisher, ggn, kfac
from hesscope.operators.kfac import KroneckerFactored
from hesscope.problem import Problem
from hesscope.results import Approximations, Block
from hesscope.results.approximations import COLUMNS, TITLES, inside

#: The parts of the exact block: A inside the groups of its coordinates and zero elsewhere.
_PARTS: dict[str, Callable[[Membership], Tensor]] = {
    "diagonal": lambda members: torch.arange(len(members.row)),
    "rows": lambda members: members.row,
    "layers": lambda members: members.layer_of_row[members.row],
    "blocks": lambda members: members.block_of_layer[members.layer_of_row[members.row]],
}
_OPERATORS = ("ggn", "fisher", "kfac", "ekfac")
KINDS = (*_PARTS, *_OPERATORS)
_DEFAULT = (*_PARTS, "ggn", "kfac", "ekfac")
_CHUNK_BYTES = 64 * 2**20


def approximations(
    H: Operator | Block,
    kinds: Sequence[str] | None = None,
    samples: int = 1,
    per: str = "token",
    seed: int = 0,
    exact: Block | None = None,
    others: Mapping[str, Operator] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
) -> Approximations:
    """Hold approximations M of a curvature matrix to its exact block A over the same selection.

    Errors are |M - A|_F / |A|_F as M stands and for the best multiple c M, c = <M, A> / <M, M>, where the error is
    sqrt(1 - cosine^2): an approximation that is right up to its scale serves a method that chooses a step size.

    Args:
        H: an operator, whose exact block is computed (n products), or such a block.
        kinds: some of "diagonal", "rows" (of one output unit), "layers", "blocks": A there and zero elsewhere; "ggn",
            "fisher", "kfac", "ekfac", which need an operator of a problem. All but "fisher" by default, as far as they exist
            for H and its selection; what was left out, and why, is in `skipped`.
        samples, per, seed: of the label sets of "fisher", "kfac" and "ekfac".
        exact: H's block, where it was computed before, by whatever engine.
        others: further approximations by name, operators over the same selection.
        checkpoint: as for `hesscope.block`, for H's.

    Raises:
        HesscopeError: an unknown kind, one that was asked for and cannot be made, an operator of another selection, or a block that
            its record says is another operator's.

    Example:
        >>> import torch, hesscope as hs
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> hs.approximations(hs.operator(A), kinds=["diagonal"]).errors             # sqrt(2 / 10)
        tensor([0.4472], dtype=torch.float64)
    """
    began = time.perf_counter()
    wanted = _checked(kinds)
    if isinstance(H, Block):
        exact, operator = H, None
    else:
        operator = H
        exact = _own(exact, H) if exact is not None else block(H, checkpoint=checkpoint)
    table = _Table(exact)
    members = membership(exact.labels, exact.provenance.get("selection"))
    for name in (name for name in wanted if name in _PARTS):
        table.add_part(name, _PARTS[name](members), asked=kinds is not None)
    for name in (name for name in wanted if name in _OPERATORS):
        _add(table, name, operator, {"samples": samples, "seed": seed, "per": per}, asked=kinds is not None)
    for name, M in (others or {}).items():
        if operator is not None and not M.space.same_as(operator.space):
            raise HesscopeError(f"Expected {name!r} to be an operator on the same selection; select once for both.")
        table.add_operator(name, M)
    if not table.rows:
        raise HesscopeError(
            "Expected at least one approximation to compare, got none: " + "; ".join(table.skipped.values())
        )
    options = {"kinds": list(wanted), "samples": samples, "per": per, "seed": seed}
    return table.result(options, time.perf_counter() - began)


def _checked(kinds: Sequence[str] | None) -> tuple[str, ...]:
    wanted = _DEFAULT if kinds is None else tuple(kinds)
    unknown = [name for name in wanted if name not in KINDS]
    if unknown:
        raise HesscopeError(f"Expected kinds among {', '.join(KINDS)}, got {unknown[0]!r}.")
    return tuple(dict.fromkeys(wanted))


def _own(exact: Block, H: Operator) -> Block:
    """The block, known to be H's."""
    if exact.labels != H.space.labels:
        raise HesscopeError(
            f"Expected an exact block over the {H.space.size} selected coordinates, got one over {len(exact.labels)} or other "
            "coordinates; use the same selection."
        )
    changed = other_matrix(exact.provenance, provenance(H, {}))
    if changed:
        raise HesscopeError(
            f"Expected the exact block of this operator, model, data and loss; the one given is of another: {'; '.join(changed)}."
        )
    return exact


def _add(table: _Table, name: str, H: Operator | None, labels: dict[str, Any], asked: bool) -> None:
    """Make one operator of H's problem and add it; skip it with a reason where it was not asked for by name."""
    problem = getattr(H, "problem", None)
    try:
        if H is None or not isinstance(problem, Problem):
            raise HesscopeError(
                f"Expected an operator of a problem, such as hs.hessian(problem, space), for {name!r}; pass that, or what to "
                "compare as others={name: operator}."
            )
        if H.describe().get("operator") == name == "ggn":
            raise HesscopeError("It is the exact block itself.")
        table.add_operator(name, _make(name, problem, H, labels))
    except HesscopeError as error:
        if asked:
            raise
        table.skipped[name] = str(error)


def _make(name: str, problem: Problem, H: Operator, labels: dict[str, Any]) -> Operator:
    if name == "ggn":
        return ggn(problem, H.space)
    if name == "fisher":
        return fisher(problem, H.space, **labels)
    if name == "kfac":
        return kfac(problem, H.space, samples=labels["samples"], seed=labels["seed"])
    return kfac(problem, H.space, corrected=True, **labels)


@dataclass
class _Table:
    """What is known of every approximation so far."""

    exact: Block
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    products: int = 0
    units: float = 0.0

    def add_part(self, name: str, group: Tensor, asked: bool) -> None:
        """The block inside groups of coordinates."""
        sizes = torch.bincount(group)
        if not asked and len(sizes[sizes > 0]) == 1 and len(group) > 1:
            self.skipped[name] = "the whole selection is one of them"
            return
        self.groups[name] = group
        spent = {
            "numbers": float(sizes.square().sum()),
            "forward_passes": self.exact.units,
            "own_seconds": self.exact.seconds,
        }
        self.rows[name] = compare(self.exact.matrix, inside(self.exact.matrix, group)) | spent

    def add_operator(self, name: str, M: Operator) -> None:
        """Another operator's matrix."""
        found = block(M)
        self.products, self.units = self.products + found.products, self.units + found.units
        numbers = M.numbers if isinstance(M, KroneckerFactored) else len(found.labels) ** 2
        spent = {"numbers": float(numbers), "forward_passes": found.units, "own_seconds": found.seconds}
        self.matrices[name] = found.matrix
        self.rows[name] = compare(self.exact.matrix, found.matrix) | spent

    def result(self, options: dict[str, Any], seconds: float) -> Approximations:
        def column(key: str) -> Tensor:
            return torch.tensor([row[key] for row in self.rows.values()], dtype=torch.float64)

        return Approximations(
            products=self.exact.products + self.products,
            units=self.exact.units + self.units,
            seconds=max(seconds, self.exact.seconds),
            provenance=self.exact.provenance | {"options": options},
            names=list(self.rows),
            labels=self.exact.labels,
            exact=self.exact.matrix,
            exact_units=self.exact.units,
            exact_seconds=self.exact.seconds,
            groups=self.groups,
            matrices=self.matrices,
            numbers=[int(row["numbers"]) for row in self.rows.values()],
            skipped={TITLES.get(name, name): why for name, why in self.skipped.items()},
            **{key: column(key) for key in COLUMNS},
        )


def compare(A: Tensor, M: Tensor) -> dict[str, float]:
    """The measures of an approximation M of A; errors are sums over differences, by chunks of rows, in float64."""
    sums = _sums(
        A,
        M,
        lambda a, m: torch.stack(
            [(a * a).sum(), (m * m).sum(), (a * m).sum(), (m - a).square().sum(), (a * a)[m != 0].sum()]
        ),
    )
    energy, own, common, gap, kept = sums.tolist()
    c = common / own if own > 0 else 0.0
    rest = float(_sums(A, M, lambda a, m: (c * m - a).square().sum()))
    a, m = A.diagonal().double(), M.diagonal().double()
    return {
        "kept": _ratio(kept, energy),
        "errors": math.sqrt(_ratio(gap, energy)),
        "scales": c,
        "scaled_errors": math.sqrt(_ratio(rest, energy)),
        "cosines": common / math.sqrt(energy * own) if energy * own > 0 else 0.0,
        "diagonal_errors": math.sqrt(_ratio(float((m - a).square().sum()), float(a.square().sum()))),
    }


def _sums(A: Tensor, M: Tensor, of_rows: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    step = max(1, _CHUNK_BYTES // (8 * len(A)))
    pieces = [
        of_rows(A[start : start + step].double(), M[start : start + step].double()) for start in range(0, len(A), step)
    ]
    return torch.stack(pieces).sum(0)


def _ratio(part: float, whole: float) -> float:
    """part / whole; of nothing, nothing is missing."""
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)
