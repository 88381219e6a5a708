"""What tells one run from another: every operator's record says which it is, in whatever processes it is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from hesscope.algorithms.identity import differences, identity, recorded
from hesscope.operators.congruence import DiagonalCongruence

F64 = torch.float64


def problem(label: int = 0) -> hs.Problem:
    torch.manual_seed(0)
    batch = (torch.arange(6, dtype=F64).view(2, 3), torch.tensor([label % 2, label // 2]))
    return hs.supervised(nn.Linear(3, 2, bias=False).double(), [batch])


def unit(i: int, n: int = 6) -> Tensor:
    return torch.eye(n, dtype=F64)[i]


def scaled(i: int) -> hs.Operator:
    H = hs.hessian(problem())
    return DiagonalCongruence(H, H.space.one(1 + unit(i)))


#: {what: the i-th of operators that differ in it; vectors and diagonals differ in their order alone}
FAMILIES: dict[str, Callable[[int], hs.Operator]] = {
    "update": lambda i: hs.hessian(problem()).updated(unit(i)),
    "update inside": lambda i: 2.0 * (hs.hessian(problem()) + hs.ggn(problem()).updated(unit(i))),
    "update's weight": lambda i: hs.hessian(problem()).updated(unit(0), 1.0 + 1e-6 * i),
    "multiple": lambda i: (1.0 + 1e-6 * i) * hs.hessian(problem()),
    "shift": lambda i: hs.hessian(problem()).shifted(0.1 + 1e-7 * i),
    "second problem": lambda i: hs.hessian(problem()) - hs.hessian(problem(1 + i)),
    "third problem": lambda i: hs.hessian(problem()) + (hs.ggn(problem()) + hs.kfac(problem(i))),
    "scales": scaled,
    "matrix": lambda i: hs.operator(torch.diag(1 + unit(i))),
    "function": lambda i: hs.operator(lambda X: (1 + unit(i))[:, None] * X, size=6, dtype=F64),
    "scipy": lambda i: hs.operator(hs.operator(torch.diag(1 + unit(i))).to_scipy()),
    "kfac seed": lambda i: hs.kfac(problem(), seed=i),
    "kfac samples": lambda i: hs.kfac(problem(), samples=1 + i),
    "kfac correction": lambda i: hs.kfac(problem(), corrected=bool(i)),
    "ekfac labels": lambda i: hs.kfac(problem(), corrected=True, labels=("sampled", "empirical")[i]),
}


@pytest.mark.parametrize("what", FAMILIES)
def test_operators_that_differ_are_told_apart(what: str) -> None:
    one, again, other = (identity(FAMILIES[what](i), "trace", {}, {}) for i in (0, 0, 1))
    assert differences(one, again) == []
    assert differences(one, other)


@pytest.mark.parametrize("what", [name for name in FAMILIES if name not in ("function", "scipy")])
def test_records_tell_them_apart_as_well(what: str) -> None:
    def record(i: int) -> dict[str, Any]:
        return hs.trace(FAMILIES[what](i)).provenance

    assert differences(recorded(record(0)), recorded(record(0))) == []
    assert differences(recorded(record(0)), recorded(record(1)))


def test_a_vector_written_to_after_it_was_described_is_another() -> None:
    g = unit(0)
    H = hs.hessian(problem()).updated(g)
    before = H.describe()
    g[1] = 2.0
    after = H.describe()
    assert (before != after) == bool((H @ unit(1) != hs.hessian(problem()) @ unit(1)).any())


def test_what_is_derived_from_the_problem_needs_no_digest() -> None:
    torch.manual_seed(0)
    of = hs.supervised(nn.Linear(3, 2), [(torch.ones(2, 3), torch.tensor([0, 1]))], objective="perplexity")
    assert "sha256" not in str(hs.hessian(of).describe())
